"""Captions as T5 gets them: without addresses, markup, file names, article numbers and shops' phrases, in lower case.

    clean_caption("A  PHOTO of a <b>cat</b>, www.example.com")     # "a photo of a cat"

These are the rules of DeepFloyd IF, which LlamaGen took over and applies twice: its released models know captions in
this form only. The order of the rules matters, and odd effects are kept ("jane.doe" becomes "jane. doe").
Where a rule as usually written takes quadratic time on long texts, what is here finds the same in linear time.
"""
import html
import re
import warnings
from urllib.parse import unquote_plus

from utils import cli

CLEANING = "deepfloyd, twice"  # what checkpoints and feature stores say of how their captions were cleaned
TOP_DOMAINS = r"[.](?:com|co|ru|net|org|edu|gov|it)"
HAS_ADDRESS = re.compile(rf"https?:|www:|{TOP_DOMAINS}")
WORD_EDGE = re.compile(r"\b(?=[a-zA-Z0-9.\-])")
HOST_LETTERS = re.compile(r"[a-zA-Z0-9.\-]*")
HOST_END = re.compile(rf"{TOP_DOMAINS}[\w/-]*\b/?(?!@)")
SCHEMES = tuple(re.compile(rf"{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])") for scheme in ("https?", "www"))

TAG = re.compile(r"<[^<>]*>")
MOST_TAGS = 200  # for the parser, which takes minutes for 100,000 characters of tags that do not end

EXTENSIONS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
FILE_END = re.compile(rf"\.(?:{EXTENSIONS})")
WORD = re.compile(r"\S+")
JOINTS = re.compile(r"[-_]")
MOST_JOINTS = 3  # with more of them it is this-kind-of-name, whose parts are words

Rules = tuple[tuple[re.Pattern[str], str], ...]


def rules(*pairs: tuple[str, str]) -> Rules:
    """(pattern, what takes its place), compiled."""
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


SIGNS = rules(
    (r"@[\w\d]+\b", ""),  # @nickname
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),  # CJK
    (r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
     r"\ufe63\uff0d]+", "-"),  # every dash
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
)
NUMBERS = rules(
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),  # a line break that was spelt out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
)
PUNCTUATION = rules(
    (r"[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),  # a stop that stands alone
)
IDENTIFIERS = rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
)
PHRASES = rules(
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{EXTENSIONS})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1024x768, also with the Cyrillic letter or the sign for times
)
SPACES = rules(
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS = rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """A caption as the encoder gets it: `clean`, twice. May be empty.

    Raises ValueError when ftfy or beautifulsoup4 is missing.
    """
    return clean(clean(text))


def clean(text: str) -> str:
    """One pass over a caption. Takes any text, in time linear in its length."""
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    for scheme in SCHEMES:
        text = without_addresses(text, scheme)
    text = text_of_html(text)
    text = without_files(applied(NUMBERS, applied(SIGNS, text)))
    text = applied(PUNCTUATION, text)
    if len(JOINTS.findall(text)) > MOST_JOINTS:
        text = JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(repaired(text))).strip()
    for group in (IDENTIFIERS, PHRASES, SPACES, ENDS):
        text = applied(group, text)
    return text.strip()


def applied(group: Rules, text: str) -> str:
    """The text after the rules of a group, one after the other."""
    for pattern, replacement in group:
        text = pattern.sub(replacement, text)
    return text


def without_addresses(text: str, scheme: re.Pattern[str]) -> str:
    """The text without URLs: the scheme's beginnings (https://), and hosts of the common domains with their paths.

    A host is letters, digits, stops and dashes from a word's boundary to the last common domain among them. From where
    that is not found it is not found further on among these letters, so they need no second look.
    """
    if not HAS_ADDRESS.search(text):
        return text
    kept, place, barren_until = [], 0, 0
    while found := WORD_EDGE.search(text, place):
        start = found.start()
        address = scheme.match(text, start)
        if address is None and start >= barren_until:
            barren_until = HOST_LETTERS.match(text, start).end()
            address = last_host_end(text, start + 1, barren_until)
        if address is not None:
            kept.append(text[place:start])
            place = barren_until = address.end()
        else:
            kept.append(text[place:start + 1])
            place = start + 1
    return "".join([*kept, text[place:]])


def last_host_end(text: str, start: int, end: int) -> re.Match[str] | None:
    """The last domain that begins in text[start:end], and the path after it."""
    while (stop := text.rfind(".", start, end)) >= 0:
        if found := HOST_END.match(text, stop):
            return found
        end = stop
    return None


def text_of_html(text: str) -> str:
    """The text of an HTML fragment, its entities resolved. What the parser refuses stays as it is.

    With more than MOST_TAGS, which is no caption, all between < and > goes, without the parser.
    """
    if "<" not in text and "&" not in text:
        return text
    if text.count("<") > MOST_TAGS:
        return html.unescape(TAG.sub("", text))
    cli.require_package("bs4", purpose="cleaning captions", package="beautifulsoup4")
    from bs4 import BeautifulSoup
    from bs4.exceptions import ParserRejectedMarkup
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a caption looks like a file's name, or like XML
        try:
            return BeautifulSoup(text, features="html.parser").text
        except (ParserRejectedMarkup, RecursionError):
            return text


def without_files(text: str) -> str:
    """The text without file names: of each word all up to its last known ending (a.jpg)."""
    if not FILE_END.search(text):
        return text

    def shortened(word: re.Match[str]) -> str:
        ends = [found.end() for found in FILE_END.finditer(word[0], 1)]
        return word[0][ends[-1]:] if ends else word[0]

    return WORD.sub(shortened, text)


def repaired(text: str) -> str:
    """The text with wrongly decoded letters put right, and odd forms of letters made plain."""
    cli.require_package("ftfy", purpose="cleaning captions")
    import ftfy
    return ftfy.fix_text(text)
