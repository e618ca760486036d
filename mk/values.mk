# The values on the command line, checked once, before anything reads them.

# All variables of this Makefile. They count only on the command line: clusters and CI have a MODEL, a ROOT or a PYTHON of
# their own in the environment.
variables := $(sort $(shell sed -n 's/^\([A-Z][A-Z0-9_]*\) ?=.*/\1/p' Makefile mk/*.mk))
$(foreach name,$(variables),$(if $(filter environment,$(origin $(name))),\
	$(if $(filter 0,$(MAKELEVEL)),$(if $(value $(name)),$(warning $(name) in the environment is not used; give it on the command line: make $(MAKECMDGOALS) $(name)=…))) \
	$(eval override undefine $(name))))

# A value is text. Make would run a $(shell …) in it whenever it reads the value or hands it to a recipe.
given := $(strip $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
$(foreach name,$(given),$(eval override $(name) := $$(value $(name))))

ifneq ($(filter-out $(variables),$(given)),)
$(error $(filter-out $(variables),$(given)): no variable of this Makefile; `make help` lists them)
endif

hash := \#
define newline


endef
space := $(subst x,,x x)
backslash := $(subst x,,\x)
quoted = '$(subst ','\'',$1)'
differs = $(subst x$1,,x$2)$(subst x$2,,x$1)
# Characters that mean something to Make or to the shell. A path may contain them, since it is always quoted.
marks := $(hash) ( ) [ ] { } < > ^ : ; % | & * ? ! ~ = " ' ` \ $$
marks_in = $(strip $(foreach mark,$(marks),$(findstring $(mark),$1)))
paths := MODEL SOURCE ALIGN_DATA CLARA_AGAINST TO MIRROR_TO MIRROR_FROM
flags := $(filter %_FLAGS TESTS,$(variables))
check_line = $(if $(findstring $(newline),$($1)),$(error $1 must be one line))
check_word = $(if $(call marks_in,$($1)),$(error $1=$($1): must not contain $(call marks_in,$($1))))
# Values are stored, and handed on in commands that everyone on this machine can list.
check_secret = $(if $(strip $(foreach word,$($1),$(if $(findstring ://,$(word)),$(foreach mark,$(secrets),$(findstring \
	$(mark),$(word)))))),$(error $1: contains a URL with an @ or a key, so perhaps with a password, which would be stored in .make. \
	Put the key, or user:password, into an environment variable, and give its name: MAGPIE_FLAGS="--api-key-env NAME …"))
secrets := @ key= token= secret= password=
$(foreach name,$(given),$(call check_secret,$(name)))
$(foreach name,$(given),$(call check_line,$(name)))
$(foreach name,$(filter-out $(paths) $(flags),$(given)),$(call check_word,$(name)))

# Flags are split into words as a shell splits them, but nothing in them is run.
split := python3 -c 'import shlex, sys; print(shlex.join(shlex.split(sys.argv[1])))'
$(foreach name,$(filter $(flags),$(given)),$(if $(call marks_in,$($(name))),\
	$(eval override $(name) := $$(shell $$(split) $$(call quoted,$$($(name))) 2> /dev/null))$(if $(filter 0,$(.SHELLSTATUS)),,\
	$(error $(name): a quote is not closed))))

# The last part of a path, and a name made from it: with - for what cannot be in a name.
last_part = $(lastword $(subst /, ,$(subst $(space),:,$1)))
clear = $(if $2,$(call clear,$(subst $(firstword $2), ,$1),$(wordlist 2,99,$2)),$1)
tidy = $(subst $(space),-,$(strip $(call clear,$1,$(marks))))
