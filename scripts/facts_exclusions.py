"""What the embedded facts leave out or rename by hand, with the reason.

These are places and names where a plain statement would be doubtful, out of date or misleading
although the sources contain it. Countries, languages and airports are given by ISO 3166, ISO 639
and IATA code.
"""

from __future__ import annotations


def names(text: str) -> frozenset[str]:
    """The comma-separated names in `text`."""
    return frozenset(" ".join(name.split()) for name in text.split(","))


# Dependent territories, dissolved states, and places whose status is disputed.
NOT_COUNTRIES = frozenset(
    [
        "AI",
        "AN",
        "AQ",
        "AS",
        "AW",
        "AX",
        "BL",
        "BM",
        "BQ",
        "BV",
        "CC",
        "CK",
        "CS",
        "CW",
        "CX",
        "EH",
        "FK",
        "FO",
        "GF",
        "GG",
        "GI",
        "GL",
        "GP",
        "GS",
        "GU",
        "HK",
        "HM",
        "IM",
        "IO",
        "JE",
        "KY",
        "MF",
        "MO",
        "MP",
        "MQ",
        "MS",
        "NC",
        "NF",
        "NU",
        "PF",
        "PM",
        "PN",
        "PR",
        "PS",
        "RE",
        "SH",
        "SJ",
        "SX",
        "TC",
        "TF",
        "TK",
        "TW",
        "UM",
        "VG",
        "VI",
        "WF",
        "XK",
        "YT",
    ]
)
COUNTRY_NAMES = {
    "NL": "Netherlands",
    "CV": "Cape Verde",
    "TL": "East Timor",
    "VA": "Vatican City",
    "CI": "Ivory Coast",
    "ST": "Sao Tome and Principe",
}
WITH_ARTICLE = frozenset(
    ["AE", "BS", "CF", "CD", "CG", "DO", "GM", "KM", "MH", "MV", "NL", "PH", "SB", "GB", "US"]
)

# Capitals that moved or are about to, were renamed, are shared between cities, or are contested.
NO_CAPITAL = frozenset(
    ["BI", "BO", "GQ", "ID", "IL", "KZ", "LK", "NR", "PW", "SZ", "TZ", "YE", "ZA"]
)
# Countries on two continents, or counted differently by different authors.
NO_CONTINENT = frozenset(["AM", "AZ", "CY", "EG", "GE", "ID", "KZ", "RU", "TL", "TR", "YE"])
# Several currencies at once, a change about the date of the sources, or a misspelt name there.
NO_CURRENCY = frozenset(["BG", "CU", "GY", "KG", "SV", "ZW"])
# A status that changed lately or is a matter of custom, or a language that is counted differently.
NO_LANGUAGE = frozenset(
    ["AF", "BF", "ER", "KZ", "ML", "MU", "NE", "PG", "RW", "SD", "SG", "SS", "UG", "VA", "VU", "ZW"]
)
# countryinfo gives a noun, a plural, an outdated spelling, or a word for half of the people.
NO_DEMONYM = frozenset(
    [
        "AG",
        "AR",
        "BA",
        "BW",
        "CV",
        "DJ",
        "EC",
        "GW",
        "IS",
        "KG",
        "KM",
        "KN",
        "LI",
        "LS",
        "LU",
        "MV",
        "NZ",
        "SA",
        "SB",
        "SI",
        "SR",
        "ST",
        "TJ",
        "TM",
        "TT",
        "VA",
        "VC",
    ]
)

# Names in wider use than those of the source.
LANGUAGE_NAMES = {
    "Avaric": "Avar",
    "Bangla": "Bengali",
    "Divehi": "Dhivehi",
    "Ganda": "Luganda",
    "Kalaallisut": "Greenlandic",
    "Nauru": "Nauruan",
    "Nyanja": "Chichewa",
    "Ossetic": "Ossetian",
    "Rundi": "Kirundi",
    "Southern Sotho": "Sesotho",
}
SCRIPT_NAMES = {"Bangla": "Bengali", "Myanmar": "Burmese"}
# Constructed, liturgical or extinct languages; names that stand for several codes or a family.
NO_LANGUAGE_CODE = frozenset(
    [
        "ae",
        "ay",
        "bh",
        "cr",
        "cu",
        "eo",
        "ff",
        "gn",
        "ia",
        "ie",
        "ii",
        "ik",
        "in",
        "io",
        "iw",
        "ji",
        "jw",
        "kg",
        "kj",
        "la",
        "mo",
        "nb",
        "nn",
        "no",
        "pi",
        "sa",
        "sh",
        "tl",
        "vo",
        "za",
    ]
)
# Languages written in several scripts, extinct ones, and those whose script is a matter of opinion.
NO_SCRIPT = frozenset(
    [
        "ae",
        "aeb",
        "ain",
        "akk",
        "aii",
        "ajp",
        "apc",
        "ar",
        "arc",
        "ary",
        "arz",
        "arq",
        "acm",
        "az",
        "ba",
        "bam",
        "bax",
        "be",
        "bej",
        "bfq",
        "bm",
        "bs",
        "ce",
        "chg",
        "ckb",
        "cop",
        "cr",
        "cu",
        "cv",
        "en",
        "ff",
        "gon",
        "ha",
        "hit",
        "ii",
        "iu",
        "ja",
        "jpr",
        "jrb",
        "jv",
        "kaa",
        "kaw",
        "khw",
        "kho",
        "kk",
        "ko",
        "kok",
        "ks",
        "ku",
        "kv",
        "ky",
        "lad",
        "mab",
        "man",
        "mde",
        "mn",
        "mni",
        "mnc",
        "mo",
        "ms",
        "nan",
        "pa",
        "pal",
        "phn",
        "pi",
        "rhg",
        "rom",
        "ro",
        "sa",
        "sat",
        "saz",
        "sd",
        "sga",
        "sh",
        "shi",
        "sog",
        "sr",
        "su",
        "swb",
        "sw",
        "tg",
        "tk",
        "tly",
        "tt",
        "ug",
        "uga",
        "uz",
        "vai",
        "wo",
        "xal",
        "yue",
        "za",
        "zen",
        "zdj",
        "zh",
    ]
)

# Boroughs and suburbs that the source lists as cities; disputed places; shared or odd names.
NOT_CITIES = names(
    """
    Abobo, Ahwatukee Foothills, Al Ain City, Astoria, Balbala, Bannu, Battagram, Belmont Cragin,
    Bensonhurst, Borama, Borough Park, Brick, Bronx, Brooklyn, Buda, Budta, Bukit Rahman Putra,
    Bushwick, Calumbo, Camama, Camayenne, Canarsie, Carrefour, Casas Adobes, Centennial, Chunian,
    Clinton Township, Coney Island, Cordova, Deer Valley, Donetsk, Dorchester, East Chattanooga,
    East Flatbush, East Harlem, East Independence, East Jerusalem, East Norwalk, East Village,
    Enchanted Hills, Enterprise, Esenler, Esenyurt, Evaton, Financial District, Flatbush, Flatlands,
    Fordham, Framingham Center, Golfe, Gravesend, Gustavo Adolfo Madero, Hamilton, Hargeysa, Harlem,
    Hlaingthaya, Hoji ya Henda, Homyel', Horlivka, Iztapalapa, Jackson Heights, Jamaica, Jammu,
    Jerusalem, Kakamega, Kampung Baru Subang, Kananga, Kansas City, Kennedy, Khartoum North, Kikolo,
    Kimhae, Kings Bridge, Kira, Kota Kuala Muda, Kowloon, Lexington-Fayette, Logan Square, Luhansk,
    Madinah, Maianga, Makiyivka, Makkah, Malingao, Manhattan, Mariupol, Maryvale, Meads, Metairie
    Terrace, Mirpur Model Thana, Mohammadpur, Mukim Pulai, Mulenvos, Nansana, Near North Side, New
    Kingston, New South Memphis, North Peoria, North Stamford, Nova Vida, Pallabi, Paradise, Park
    Slope, Parkchester, Pelentong, Pest, Pikine, Plymouth, Portage Park, Portsmouth Heights, Queens,
    Richmond Hill, Sadr City, San Tan Valley, Sancaktepe, Sandy, Sandy Hills, Selayang Baru Utara,
    Sevastopol, Sheepshead Bay, Simferopol, Soshanguve, South Boston, South Lawndale, South Ozone
    Park, South Suffolk, Srinagar, Staten Island, Stepanakert, Sunrise Manor, Sunset Park, Surprise,
    Surrey, Takeo, Talatona, Tempe Junction, The Bronx, The Hague, Thembisa, Tri-Cities, Umraniye,
    Upper West Side, Viana, Villa Nueva, Warder, Washington, West Albany, West Bloomfield Township,
    West Coon Rapids, West Gulfport, West Lynchburg, West Raleigh, West Ridge, West Town, Wuzhong
    """
)
# The same among the famous cities, and names that mean something else to most readers.
NOT_FAMOUS_CITIES = names(
    """
    Bago City, Bender, Catamarca, Dartmouth, Ganja, Honmachi, Isidro Casanova, Kerch, La Rioja,
    La Vega, Lhasa, Magugpo Poblacion, Manas, Mandaluyong City, Mary, Milagro, Oral, Semey,
    Smolyanskyi, South Dublin, Sunshine Coast, Tiraspol, Tuxtla
    """
)
# Closed airports, those filed under a place they do not mainly serve, names or cities of two.
NOT_AIRPORTS = frozenset(
    [
        "ISL",
        "TXL",
        "YYZ",
        "DIA",
        "CEB",
        "JRO",
        "COV",
        "RLO",
        "ILS",
        "OSF",
        "LCK",
        "FTW",
        "BHX",
        "BAQ",
        "HWR",
        "HYD",
        "KAN",
        "SMR",
        "DWC",
        "ECN",
    ]
)
