"""Texts in any script, written in one way, so that words can be compared."""

import unicodedata

# Chinese, Japanese and Korean, and the scripts whose words only a dictionary tells apart (class SA of UAX #14): Thai,
# Lao, Khmer and Burmese. One character, with the marks on it, counts as a word.
SPACELESS = r"[\p{Han}\u3040-\u30ff\uac00-\ud7af\p{LB=SA}]"
MARK = r"[\p{Mn}\p{Mc}]"  # vowel signs and accents: part of the letter before them
# NFKC would glue these to what is before them: Java™ is Java, and 10² is not 102.
TRADEMARKS, RAISED = "[™℠]", r"(?<=\p{N})(?=\p{No})"


def fold(text: str) -> str:
    """A text in NFKC, so that é is one character and ３ is 3, without case and invisible characters such as the soft
    hyphen. The digits of all scripts become 0 to 9."""
    import regex

    if text.isascii():
        return text.casefold()
    text = regex.sub(RAISED, " ", regex.sub(rf"\p{{Default_Ignorable_Code_Point}}|{TRADEMARKS}", "", text))
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = folded.replace("i\u0307", "i")  # what is left of İ without case
    return regex.sub(r"[^\P{Nd}0-9]", lambda digit: str(unicodedata.decimal(digit[0], digit[0])), folded)


def find_all(pattern: str, text: str) -> list[str]:
    """Whatever the pattern finds, in regex's syntax: unlike `re`, it knows marks and scripts, whichever Python runs."""
    import regex

    return regex.findall(pattern, text, regex.V1 | regex.M)
