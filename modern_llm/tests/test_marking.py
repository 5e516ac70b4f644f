"""Marking: a number is read whole or not at all, compared as a number, and everything that depends
on it agrees.
"""

import gzip
import json
import math
import os
import random
import re
import runpy
import time
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data import synth
from modern_llm.data.answer_pairs import perturb
from modern_llm.data.chat import Answer
from modern_llm.data.synth import Problem
from modern_llm.data.tasks import (
    Calculator, flexible_answer, mark, rerank, strict_answer, word_problems,
)
from modern_llm.data.tokens import encode_documents, train_tokenizer
from modern_llm.evaluation.written import error_kind, mark_problems
from modern_llm.files import cached_frame
from modern_llm.training.sft import InstructionExample, is_right, parses

pytestmark = pytest.mark.fault("marking")
MILLION = 10**6


def said(text: str) -> Answer:
    return Answer(text, [0], [0.0], ended=True)


def of(value: float) -> Problem:
    return Problem("How many?", f"#### {value}", 1, value)


# ---- what is read --------------------------------------------------------------------------------

NUMBERS = {
    "a sign": {"-3": -3, "+5": 5, "−3": -3, "–3": -3, "- 3": -3, "-$3": -3, "$-3": -3, "$ -3": -3,
               "- $3": -3, "+$5": 5, "-.5": -0.5, "-0": 0, "-1/2": -0.5, "-½": -0.5, "－３": -3},
    "thousands": {"1,000": 1000, "1,234,567": 1234567, "1 000": 1000, "1 000 000": MILLION,
                  "1\u00a0000": 1000, "1\u2009000": 1000, "1\u202f234\u202f567": 1234567,
                  "1'000": 1000, "1’234.50": 1234.5, "12,34,567": 1234567, "1.234.567": 1234567,
                  "1_000": 1000, "$1,234.50": 1234.5, "1{,}000": 1000, "1\\,000": 1000},
    "decimals": {"12.50": 12.5, "12.5": 12.5, "0.75": 0.75, ".5": 0.5, "5.": 5, "5.0": 5, "5.00": 5,
                 "0.1": 0.1, "1.10": 1.1, "007": 7, "12,5": 12.5, "12,50": 12.5, "0,125": 0.125,
                 "1.234,56": 1234.56, "1 234,56": 1234.56, "1,234.56": 1234.56, "1.234": 1.234,
                 "3.14159": 3.14159},
    "a currency": {"$3": 3, "$ 3": 3, "€3": 3, "3€": 3, "3 €": 3, "£3.20": 3.2, "¥500": 500,
                   "₹12,34,567": 1234567, "US$5": 5, "USD 12": 12, "12 USD": 12, "12 dollars": 12,
                   "30 cents": 30, "$5 per hour": 5, "$5/hour": 5, "Rs. 500": 500, "\\$12": 12,
                   "$12$": 12, "＄5": 5},
    "a unit": {"12 apples": 12, "12 apples.": 12, "12kg": 12, "12 km/h": 12, "12 m²": 12,
               "12 cm^2": 12, "12-inch": 12, "12 sq. ft.": 12, "12 children's books": 12,
               "12°C": 12, "50%": 50, "50 %": 50, "50 percent": 50, "12\\%": 12, "5th": 5,
               "3 teachers & pupils": 3, "12 o'clock": 12, "12 to each child": 12,
               "12 and change": 12},
    "a fraction": {"1/2": 0.5, "3/4": 0.75, "6/2": 3, "1 1/2": 1.5, "-1 1/2": -1.5, "½": 0.5,
                   "1½": 1.5, "1/3": 1 / 3, "2/6": 1 / 3, "1 / 2": 0.5, "\\frac{1}{2}": 0.5,
                   "1/2 cup": 0.5},
    "a power": {"1.5e6": 1500000, "1E3": 1000, "2e-3": 0.002, "1.5×10^6": 1500000,
                "1.5 x 10^6": 1500000, "1.5 × 10⁶": 1500000, "2 million": 2000000,
                "$1.5 million": 1500000, "5k": 5000, "$2M": 2000000, "3 hundred": 300},
    "other digits": {"１２": 12, "١٢": 12, "٣٫٥": 3.5, "३": 3, "𝟏𝟐": 12},
    "around it": {"**12**": 12, "**12** apples": 12, "`12`": 12, "'12'": 12, "\\boxed{12}": 12,
                  "\\boxed{\\frac{1}{2}}": 0.5, "<<3+4=7>>7": 7, "$<<3+4=7>>7": 7,
                  "12 (3 boxes of 4)": 12, "12, because 3*4 = 12": 12, "12 because 3*4": 12,
                  "12. That is 3*4": 12, "12 #### 13": 12, "12\nQuestion: 5": 12, "12\r\n": 12,
                  "12</s>": 12, "12<|endoftext|>": 12, "12!": 12, "12...": 12, "\u200b12": 12,
                  "\n12": 12, "12\u20285": 12, "12 — that is, 3 fours": 12, "“12”": 12, "«12»": 12,
                  "„12“ apples": 12},
    "an emoji": {"12 🎉": 12, "12🍎": 12, "✅ 12": 12, "12 ✔️": 12, "12 👩‍👩‍👧 each": 12, "7️⃣": 7,
                 "1️⃣2️⃣": 12, "$1,234.50 💰.": 1234.5},
    "exactly": {"9007199254740993": 2**53 + 1, "1,000,000,000,000,000,000,001": 10**21 + 1,
                "1" + "0" * 299: 10**299},
}
NO_NUMBERS = {
    "a time or a ratio": ("2:30", "2 : 30", "12:00 pm", "3:1"),
    "a range": ("3-4", "3–4", "3—4", "3 - 4", "3 to 4", "3 or 4", "3 and 4", "three to 4",
                "3 to four"),
    "a list": ("1,2,3", "3, 4", "12 apples, 3 pears"),
    "a date or a version": ("1.2.3", "10/12/2020", "2020-10-12", "1/2/3"),
    "several quantities": ("5 ft 6 in", "5'6\"", "2 hours 30 minutes", "12 and a half",
                           "5 feet and a half", "3 point five", "2 out of 3", "12 50", "1h30",
                           "1h 30m", "12 apples and one pear"),
    "a sum": ("3+4", "3+4=7", "3*4", "3x4", "2^3", "5²", "12 + x", "x = 7", "12 = 3*4", "±3",
              "12 ± 1"),
    "wrongly grouped": ("12,5678", "12,345,67", "1,,000", "1 0000", "1 00", "1.2,3"),
    "no digits": ("", "no", "seven", "$", "-", "%", "nan", "inf", "-inf", "①"),
    "nothing a float holds": ("1e400", "1e-400", "1e999999999", "9" * 5000, "0." + "0" * 400 + "1"),
    "division by zero": ("1/0", "0/0"),
    "an emoji between": ("12🍎13", "12🍎000", "12 🍎 3 🍐", "→12", "12 → 13"),
    "other notations": ("0x1F", "--3", "+-3", "-$-3", "12₀", "1..5", "(12)"),
}
READ = [pytest.param(text, value, id=f"{kind}-{text.encode('unicode_escape').decode()[:30]}")
        for kind, cases in NUMBERS.items() for text, value in cases.items()]
NOT_READ = [pytest.param(text, id=f"{kind}-{text[:30].encode('unicode_escape').decode()}")
            for kind, cases in NO_NUMBERS.items() for text in cases]


@pytest.mark.parametrize("text, value", READ)
def test_a_number_is_read_whole(text, value):
    found = synth.extract_answer(f"so it is\n#### {text}")
    assert (found == value and type(found) in (int, float)
            and isinstance(found, int) == float(value).is_integer())
    assert (mark([of(value)], [said(f"#### {text}")]).right.all()
            and not mark([of(value + 1 if value < 1e15 else 7)],
                         [said(f"#### {text}")]).right.any())


@pytest.mark.parametrize("text", NOT_READ)
def test_what_is_no_number_is_no_answer(text):
    answer = f"so it is\n#### {text}"
    assert synth.extract_answer(answer) is None
    begins = re.match(r"\d{1,9}", text)
    row = mark_problems([of(int(begins[0]) if begins else 0)], [said(answer)]).iloc[0]
    assert not row.right and math.isnan(row.value) and error_kind(row) == "no answer"


@pytest.mark.parametrize(
    "text, value",
    [("so 1,007 in all", 1007), ("It is $1,234.50.", 1234.5), ("costs 1/2.", 0.5),
     ("He owes -$3", -3), ("x=-3.", -3), ("16 - 3 - 4 = 9 eggs", 9), ("3+4=<<3+4=7>>7 cups", 7),
     ("2 million people", 2000000), ("12 apples at 2:30", 12), ("5 m^2 of cloth", 5),
     ("50% off", 50), ("12.Then", 12), ("pages 3-4", None), ("on 10/12/2020", None),
     ("version 1.2.3", None), ("room B12", None), ("1,2,3 go", None), ("no", None)])
def test_the_last_number_anywhere(text, value):
    assert flexible_answer(text) == value


def test_long_texts_are_read_in_little_time():
    hostile = ("12" + " " * 20000 + "3", "12" + "." * 20000 + "3", "1 111" * 2000, "1" * 20000,
               "12 " + "a-" * 10000 + "3", "<<" * 10000, "\\text{" * 5000, "1/" * 10000,
               "-" * 20000, "1,000" * 4000, "12" + " -" * 10000, "1e" * 10000)
    start = time.perf_counter()
    for text in hostile:
        (synth.extract_answer(f"#### {text}"),
         flexible_answer(text), synth.check_solution(f"<<1+1=2>>{text}"))
    # a second on a quiet machine; a pattern that backtracks takes hours
    assert time.perf_counter() - start < 20


# ---- properties ----------------------------------------------------------------------------------

quickly = settings(max_examples=150, deadline=None, derandomize=True)
cents = st.integers(-10**11, 10**11)


@quickly
@given(st.integers(-10**18, 10**18), st.sampled_from([",", " ", "\u202f", "'", "_", ""]),
       st.sampled_from(["", "$", "€"]),
       st.sampled_from(["", ".", " apples", "%", ".0", ".00 dollars", "\nand on"]))
def test_every_way_to_write_a_whole_number(value, mark_, money, behind):
    digits = f"{abs(value):,}".replace(",", mark_)
    for text in (f"{'-' * (value < 0)}{money}{digits}{behind}",
                 f"{money}{'-' * (value < 0)}{digits}{behind}"):
        assert strict_answer(f"#### {text}") == value


@quickly
@given(cents, st.integers(0, 3), st.booleans())
def test_trailing_zeros_and_grouping_change_nothing(value, zeros, grouped):
    number, exact = value / 100, Fraction(value, 100)
    text = f"{number:,.2f}" if grouped else f"{number:.2f}"
    found = strict_answer(f"#### {text}{'0' * zeros}")
    assert (found == (int(exact) if exact.denominator == 1 else float(exact))
            == flexible_answer(f"It is {text}{'0' * zeros} then"))
    assert strict_answer(f"#### {text.replace(',', ' ').replace('.', ',')}") == found


@quickly
@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_is_its_quotient(top, bottom):
    assert (strict_answer(f"#### {top}/{bottom}")
            == (top // bottom if top % bottom == 0 else top / bottom))


@quickly
@given(st.text(max_size=40), st.text(alphabet="0123456789.,'$%-+/:eE xX()\n#<>", max_size=40))
def test_no_text_is_too_strange(anything, digits):
    texts = (anything, digits, f"#### {anything}", f"#### {digits}",
             f"<<{digits}={anything}>>{digits}")
    table = mark([of(7)] * 5, [said(text) for text in texts])
    for text, row in zip(texts, table.itertuples()):
        for value in (strict_answer(text), flexible_answer(text)):
            assert value is None or type(value) in (int, float) and math.isfinite(value)
        assert (math.isnan(row.value) == (row.number == "")
                and row.right == (strict_answer(text) == 7) and row.consistent in (True, False))


# ---- compared as numbers, everywhere -------------------------------------------------------------


def test_right_votes_labels_and_levels_follow_the_number(tmp_path):
    answers = [said(text) for text in ("#### 12.50", "#### $12.5", "#### 12", "#### 25/2 dollars",
                                       "#### 12:30", "#### 12.5e0")]
    table = cached_frame(tmp_path / "samples.jsonl",
                         lambda: mark_problems([of(12.5)], answers, samples=6))
    assert (table.right.tolist() == [True, True, False, True, False, True]
            and table.flexible.tolist() == [True, True, False, True, False, True])
    assert (table.value.tolist()[:4] == [12.5, 12.5, 12, 12.5]
            and table.number.tolist() == ["12.5", "12.5", "12", "12.5", "", "12.5"])
    assert rerank(table, 6, "majority").tolist() == [1.0], (
        "equal numbers vote together, however they are written")


def test_whole_numbers_beyond_a_floats_reach_are_told_apart(tmp_path):
    large = 2**53
    answers = [said(f"#### {value}") for value in (large, large, large + 1, large + 1, large + 1)]
    table = cached_frame(tmp_path / "samples.jsonl",
                         lambda: mark([of(large + 1)], answers, samples=5))
    assert (table.right.tolist() == [False, False, True, True, True]
            and rerank(table, 5, "majority").tolist() == [1.0])
    assert (rerank(table.drop(columns="number"), 5, "majority").tolist()
            == [pytest.approx(0.6)]), "their floats are equal"


def test_samples_with_values_alone_vote_by_value():
    table = pd.DataFrame({"problem": 0, "sample": range(4),
                          "value": [7.0, 7.0, 8.0, math.nan], "log_prob": -1.0, "consistent": True,
                          "right": [True, True, False, False]})
    assert (rerank(table, 4, "majority").tolist() == [1.0]
            and rerank(table, 4, "calculator").iloc[0] == pytest.approx(2 / 3))


@pytest.mark.parametrize("gold, text, right",
                         [("#### 2.5", "#### 2", False), ("#### 2.5", "#### 2.50", True),
                          ("#### 3", "#### 3.0", True), ("#### 3", "#### 3-4", False),
                          ("#### 0.1", "#### 1/10", True), ("#### 1,000", "#### 1 000", True)])
def test_instruction_tuning_judges_alike(gold, text, right):
    example = InstructionExample("How many?", output=gold, kind="problem")
    assert is_right(example, text) is right and parses(example, text) is (text != "#### 3-4")


@pytest.mark.parametrize("gold, value",
                         [("#### 2.5", 2.5), ("#### 1,080", 1080), ("#### $1/2", 0.5),
                          ("#### 12:30", None), ("#### twelve", None)])
def test_a_gold_answer_is_read_whole_or_refused_with_its_row(tmp_path, monkeypatch, gold, value):
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        rows = [{"question": f"How many, {name}?", "answer": "#### 1"},
                {"question": f"How much, {name}?", "answer": f"<<1+1=2>>2\n{gold}"}]
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n",
                                                          encoding="utf-8")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    if value is None:
        with pytest.raises(ValueError, match=f"(?s)test.jsonl.*2.*{gold}"):
            word_problems("gsm8k", "test", 2)
    else:
        assert word_problems("gsm8k", "test", 2)[1].value == value


def test_kept_answers_are_marked_again(tmp_path):
    """Two answers as they were marked when a number was read up to its point: the one with a
    fraction was taken for right.
    """
    remark = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "remark.py"))
    problem = word_problems("synthetic", "test", 1, levels=[1])[0]
    table = pd.DataFrame({"problem": 0, "text": [f"#### {problem.value}.5", problem.answer],
                          "value": [float(problem.value)] * 2, "right": True,
                          "flexible": [False, True], "consistent": [False, True], "ended": True})
    table.to_json(tmp_path / "base-problems.jsonl", orient="records", lines=True)
    found = remark["remarked"](
        tmp_path / "base-problems.jsonl",
        {"problems": "synthetic", "num_problems": 1, "levels": [1], "seed": 0})
    assert ((found["values"], found["marks"], found["flexible"], found["sums"]) == (1, 1, 0, 0)
            and (found["right before"], found["right now"]) == (1, 0.5))


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, value",
    [("2*20*.01", 0.4), ("0.05*400", 20), ("7-4.2-2.05", 0.75), ("1/.05", 20), ("+30+46", 76),
     ("560//10", 56), ("3*+6", 18), ("05+1", 6), ("1,000+1", 1001), ("1 000+1", 1001), ("$5+3", 8),
     ("3×4", 12), ("12÷4", 3), ("5−2", 3), ("1,5+1", 2.5), ("1.5e3+1", 1501), ("2:30+1", None),
     ("1e400+1", None), ("1e300*1e300", None), ("1.5e300*1.5e300", None), ("1,00,0", None)])
def test_a_sum_is_computed_of_whole_numbers(expression, value):
    assert (synth.calculate(expression)
            == (value if value is None else pytest.approx(value, abs=1e-12)))


@pytest.mark.parametrize(
    "text, right",
    [("<<20*.05=1>>1", True), ("<<400*0.05=20.00>>20.00", True), ("<<3/4=3/4>>3/4", True),
     ("<<2*3=6>>6/2=<<6/2=3>>3", True), ("<<5-8=-3>>-$3", True),
     ("<<5-8=-3>>−3", True), ("<<500*2=1000>>1 000", True), ("<<3000/2=1500>>€1,500", True),
     ("<<2400/200=12>>12 200-page books", True), ("<<6-4=2>>2:00 am", True), ("<<3+4=7>>70", False),
     ("<<3+4=7>>7.5", False), ("<<5-8=-3>>3", False), ("<<20*.05=10>>10", False)])
def test_a_marked_sum_is_checked_by_whole_numbers(text, right):
    assert synth.check_solution(text) is right


@pytest.mark.parametrize(
    "sum_, written", [("21+19", "40"), ("12345.67+1", "12346.67"), ("999999.5*1", "999999.5"),
                      ("1250.5*1000", "1250500"), ("1/3", "0.33"), ("1234567.25+0.5", "1234567.75"),
                      ("0-0.001", "0"), ("2*20*.01", "0.4"), ("7-12", "-5"), ("1e300*1e300", "")])
def test_the_calculator_writes_the_whole_result(sum_, written):
    tokenizer = train_tokenizer(["<<1+2=3>>3 0.5*4-6/7,8e9"] * 20, 300)
    found = tokenizer.decode(Calculator(tokenizer)(encode_documents(tokenizer, [f"<<{sum_}="])[0]))
    assert found == (f"{written}>>{written}" if written else "")


def test_a_number_is_spoilt_as_a_whole():
    draw = random.Random(0)
    assert ({perturb("#### 1,080", draw) for _ in range(60)}
            == {f"#### {1080 + d:,}" for d in (-10, -2, -1, 1, 2, 10)})
    for _ in range(100):
        assert strict_answer(perturb("#### 12.05", draw)) not in (None, 12.05)


# ---- against GSM8K -------------------------------------------------------------------------------

# its authors' own marks
RIGHT = {"6b_finetuning": 286, "6b_verification": 515, "175b_finetuning": 458,
         "175b_verification": 742}


@pytest.fixture(scope="module")
def gsm8k():
    if not os.environ.get("MODERN_LLM_DATA"):
        pytest.skip("MODERN_LLM_DATA is not set: no GSM8K to read")
    return Path(os.environ["MODERN_LLM_DATA"]) / "gsm8k"


@pytest.mark.parametrize("final, gold", [("32.5", 32), ("53.8", 53),
                                         ("3.4", 3), ("2.3333333333333335", 2), ("138.915", 138)])
def test_decimals_that_its_authors_marked_wrong_are_wrong(final, gold):
    """The five of GSM8K's example solutions (rows 519, 668, 772, 995 and 1017) that a reading up to
    the point takes for right.
    """
    assert not mark([of(gold)], [said(f"#### {final}")]).right.any()


@pytest.mark.parametrize("model", RIGHT)
def test_marks_of_gsm8ks_example_solutions(gsm8k, model):
    rows = [json.loads(line) for line in gzip.open(gsm8k / "example_model_solutions.jsonl.gz", "rt",
                                                   encoding="utf-8")]
    final = lambda text: text.rpartition("\n")[2].replace("A:", "####", 1)
    problems = [
        Problem(row["question"], "", 1, strict_answer(final(row["ground_truth"]))) for row in rows]
    marks = mark(problems, [said(final(row[model]["solution"])) for row in rows]).right
    assert (marks.tolist() == [row[model]["is_correct"] for row in rows]
            and marks.sum() == RIGHT[model])


def test_every_gold_solution_of_gsm8k_is_right_and_its_sums_are_true(gsm8k):
    for problem in word_problems("gsm8k", "test", 1319):
        assert problem.value == int(problem.answer.rpartition("#### ")[2].replace(",", ""))
        assert synth.check_solution(problem.answer) == ("<<" in problem.answer), problem.answer
