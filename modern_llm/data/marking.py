"""Numbers as people write them: the one place that reads a number out of a text.

Every mark, vote and label that depends on a number reads it here, whole or not at all: `12.50` is
12.5, and `2:30`, which is not a number, is nothing (rather than 2). What is read: a sign (+, -, −)
and a currency before the number, in either order, a currency or a unit behind it; thousands in
groups (`1,234`, `1 234`, `1'234`, `12,34,567`, `1.234.567`), decimals (`12.50`, `.5`, `5.`; a comma
where it cannot be one of thousands: `12,5`, `0,125`, `1.234,56`), fractions (`1/2`, `1 1/2`, `½`),
powers of ten (`1.5e6`, `1.5 × 10^6`, `2 million`, `5k`), and the digits of every script. A unit is
not converted: `50%` is 50, `30 cents` is 30. What is not: ranges, times, dates, sums, lists, and a
number beyond 10^300 either way. Standard library only.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LIMIT = 300  # powers of ten beyond which a number is none: a float holds little more
_LARGE, _SMALL = 10**LIMIT, Fraction(1, 10**LIMIT)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12, "k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "bn": 10**9,
          "B": 10**9}
_LETTER = r"[^\W\d_]"
_CURRENCY = "$£¥¤฿" + "".join(map(chr, range(0x20A0, 0x20C1)))
_MONEY = (rf"(?:(?:US|CA|AU|NZ|HK|[ACRS])?[{_CURRENCY}]|"
          r"(?:USD|EUR|GBP|CHF|JPY|CNY|INR|CAD|AUD|Rs\.?)(?![A-Za-z]))")
_GROUPED = (r"[1-9][0-9]{0,2}(?:(?P<mark>[, '_])[0-9]{3})(?:(?P=mark)[0-9]{3})*|[1-9][0-9]?"
            r"(?:,[0-9]{2})+,[0-9]{3}")
_COMMA = (r"[1-9][0-9]{0,2}(?:(?P<dot>[ '.])[0-9]{3})(?:(?P=dot)[0-9]{3})*,[0-9]{1,2}"
          r"|[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}|0,[0-9]+|[0-9]+,[0-9]{1,2}")
_DIGITS = (rf"(?:(?P<comma>{_COMMA})|"
           rf"(?P<point>(?:{_GROUPED})(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+))")
_ENDS = r"(?![0-9]|[.,'_:^][0-9])"  # no digit goes on behind it
_POWER = (r"(?:[eE](?P<e>[+-]?[0-9]+)(?!\w|\.[0-9])|\s?[×x*·⋅]\s?10(?:\^|\*\*)"
          r"(?P<power>[+-]?[0-9]+)(?!\w))?")
_SCALE = (r"(?P<scale>(?:\s?(?:hundred|thousand|million|billion|trillion)\b)+|(?<=[0-9])"
          r"(?:k|K|M|B|mn|bn)\b)?")
_FRACTION = (r"(?:(?P<whole>[0-9]+)\s(?=[1-9]))?(?P<top>[0-9]+)\s?/\s?"
             rf"(?P<bottom>[0-9]+){_ENDS}(?!\s?/)")
_PLAIN = rf"{_DIGITS}{_ENDS}{_POWER}"
_NUMBER = rf"(?:{_FRACTION}|{_PLAIN}(?!\s?/\s?[0-9]){_SCALE})"
_SIGNED = (rf"(?:(?P<sign>[-+]){{gap}})?(?P<money>{_MONEY})?{{gap}}(?P<sign_behind>"
           rf"(?<=[{_CURRENCY}A-Za-z.\s])[-+])?")
_WRITTEN = re.compile(_SIGNED.format(gap=r"\s?") + _NUMBER)
_LEADING = re.compile(_SIGNED.format(gap="") + _PLAIN)  # no fraction: `<<2*3=6>>6/2` repeats a 6
_TERM = re.compile(rf"{_MONEY}?{_PLAIN}")
_IN_TEXT = re.compile(
    r"(?<![0-9][-:/.,'^+*])(?<![\w^])" + _SIGNED.format(gap="") + _NUMBER + r"(?![-+*][0-9])")
_OPENING = re.compile(r"[\s*_`~\"']*")  # Markdown and quotes around an answer
_CLOSING = " \t\r*_`~.,;:!?…)]\"'"
_BOUNDARY = re.compile(rf"[(\[]|#(?=#)|<(?=[<|/A-Za-z])|[.,;:!?]\s+(?={_LETTER})"
                       rf"|\s[-–—]+\s+(?={_LETTER})|—(?={_LETTER})|\s(?:because|since|as|so)\b")
_WORDS = (r"(?:half|quarter|third|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
          r"(?:thir|four|fif|six|seven|eigh|nine)teen"
          r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million)\b")
_UNIT = re.compile(
    rf"""(?!(?:.*\s)?(?:and|or|to|plus|minus|times|point|over|by)\s+(?:an?\s+)?{_WORDS})(?:-(?={_LETTER}))?
    (?:{_LETTER}|[\s%‰°'"`′″¢.&{_CURRENCY}]|(?<={_LETTER})-(?={_LETTER})|/\s?(?={_LETTER})
      |(?<=\bin|\bft|\byd|\bmi)\^?[23]\b|(?<=m)\^?[23]\b)*""", re.VERBOSE)
_LATEX = [(re.compile(pattern), put) for pattern, put in (
    (r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r" \1/\2"),
    (r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1"), (r"\\boxed\s*\{([^{}]*)\}", r"\1"),
    (r"\\times\b", "×"), (r"\\!", ""), (r"\{,\}", ","), (r"\\[,;: ]", " "),
    (r"\\[()\[\]]", ""), (r"\\([$%])", r"\1"), (r"\^\{([-+]?[0-9]+)\}", r"^\1"))]
_OPERATORS = str.maketrans("×÷", "*/")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_ALIKE = {**dict.fromkeys("‐‑‒–−﹣－", "-"), **dict.fromkeys("’‘ʼ＇", "'"),
          **dict.fromkeys("“”„«»", '"'), "\ufe0f": "", "\u20e3": "", "٫": ".", "٬": ",", "。": ".",
          "⁄": "/", "∕": "/"}
_NO_NUMBER = "\N{REPLACEMENT CHARACTER}"


def _alike(char: str) -> str:
    """The ASCII characters that mean the same where a number is read; other characters as they are.
    """
    if char in _ALIKE:
        return _ALIKE[char]
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "No":  # ½ is a number; ② and ₂ are none
        return (unicodedata.normalize("NFKC", char).replace("⁄", "/")
                if "<fraction>" in unicodedata.decomposition(char) else _NO_NUMBER)
    same = unicodedata.normalize("NFKC", char)
    # an emoji says nothing, but no number goes on behind it
    if kind == "So" and same == char and char not in ("°", _NO_NUMBER):
        return "`"
    return " " if kind == "Zs" else "" if kind == "Cf" else same


def plain(text: str) -> str:
    """The text with the digits, signs and spaces of other scripts, and the commands of LaTeX around
    numbers, written in ASCII.
    """
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+",
                      lambda found: "^" + found[0].translate(_SUPERSCRIPTS), text)
        text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞↉])", " ", text)
        text = "".join(char if char.isascii() else _alike(char) for char in text)
    for pattern, put in _LATEX if "\\" in text or "{" in text else ():
        text = pattern.sub(put, text)
    return text


def _digits(found: re.Match) -> Fraction | int:
    """What the digits of a match say, without sign and scale. OverflowError or ValueError: far
    beyond what a float holds.
    """
    digits = (re.sub("[. '_]", "", found["comma"]).replace(",", ".") if found["comma"]
              else re.sub("[, '_]", "", found["point"]))
    value = int(digits) if digits.isdecimal() else Fraction(digits)
    if power := found["e"] or found["power"]:
        if len(power) > 5 or abs(int(power)) > 2 * LIMIT:
            raise OverflowError(power)
        value = value * Fraction(10) ** int(power)
    return value


def _value(found: re.Match) -> int | float | None:
    """The number of a match: a whole one exactly, another as the nearest float; None if it is none
    after all.
    """
    named = found.groupdict()
    try:
        if named.get("top"):
            whole, top, bottom = (int(named[name] or 0) for name in ("whole", "top", "bottom"))
            if not bottom or named["whole"] and top >= bottom:
                return None
            value = whole + Fraction(top, bottom)
        else:
            value = _digits(found)
    except (OverflowError, ValueError):
        return None
    scale = named.get("scale") or ""
    if (scale in ("M", "B", "mn", "bn") and not named["money"]
            or named.get("sign") and named["sign_behind"]):
        return None
    for name in scale.split():
        value *= SCALES[name]
    value = -value if "-" in (named.get("sign"), named.get("sign_behind")) else value
    if abs(value) >= _LARGE or not isinstance(value, int) and 0 < abs(value) < _SMALL:
        return None
    return int(value) if value.denominator == 1 else float(value)


def written_number(text: str) -> int | float | None:
    """The number that a line of text is, with its unit and, behind a bracket, comma or full stop,
    words about it; None if it is none.
    """
    line = re.sub(r"<<[^<>]*>>", "", plain(text))
    found = _WRITTEN.match(line, _OPENING.match(line).end())
    if not found:
        return None
    unit = _BOUNDARY.split(line[found.end():], maxsplit=1)[0].strip(_CLOSING)
    return _value(found) if _UNIT.fullmatch(unit) else None


def extract_answer(text: str) -> int | float | None:
    """The number behind the first `####`, or on the next line that is not empty; None if no number
    is written there.
    """
    _, mark, behind = re.sub("#{4,}", "####", text).partition("####")
    return written_number(next(iter(behind.lstrip().splitlines()), "")) if mark else None


def last_number(text: str) -> int | float | None:
    """The last number of a text, wherever it stands; None if there is none."""
    found = None
    for match in _IN_TEXT.finditer(plain(text)):
        value = _value(match)
        found = found if value is None else value
    return found


def repeats(text: str, value: float, fraction: bool = False) -> bool:
    """Whether a text begins with a value, to 0.01, whatever comes behind it: `6/2` with 6, unless
    it may be a `fraction`.
    """
    begins = _WRITTEN if fraction else _LEADING
    # 12 200-page books; 2:00 am
    readings = (begins.match(part)
                for part in (plain(text), re.split(r"[\s:]", plain(text), maxsplit=1)[0]))
    numbers = [_value(found) for found in readings if found]
    return any(number is not None and abs(number - value) <= 0.01 for number in numbers)


def terms_as_python(expression: str) -> str:
    """An expression with its numbers and operators as Python writes them. ValueError if one of the
    numbers is none.
    """
    def literal(found: re.Match) -> str:
        value = _value(found)
        if value is None:
            raise ValueError(found[0])
        return repr(value)

    return _TERM.sub(literal, plain(expression)).translate(_OPERATORS)


def decimal(value: float) -> str:
    """A number as a solution writes it: rounded to hundredths, without trailing zeros or a power of
    ten.
    """
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return "0" if text == "-0" else text
