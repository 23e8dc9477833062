"""A file of recorded prices that is wrong ends with its line and a clear sentence."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from pricing import SAMPLE_FILE, BadFile, SampleMarket

GOOD = "2020-01-01T00:00:00Z,ABC,1.5\n"


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        ("timestamp,price\n", 1, "the columns must be timestamp,ticker,price"),
        ("", 1, "the columns must be timestamp,ticker,price"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02T00:00:00Z,ABC\n", 3, "3 columns"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02T00:00:00Z,ABC,abc\n", 3, "must be a number"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02T00:00:00Z,ABC,NaN\n", 3, "must be a number"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02T00:00:00Z,ABC,-1\n", 3, "must be a number"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02T00:00:00Z,ABC,0\n", 3, "above 0"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02,ABC,1\n", 3, "must be a time"),
        (f"timestamp,ticker,price\n{GOOD}2019-01-02T00:00:00Z,ABC,1\n", 3, "is later"),
        (f"timestamp,ticker,price\n{GOOD}{GOOD}", 3, "already"),
        (f"timestamp,ticker,price\n{GOOD}2020-01-02T00:00:00Z,A B,1\n", 3, "letters, digits"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, text, line, sentence):
    file = tmp_path / "market.csv"
    file.write_text(text)
    with pytest.raises(BadFile, match=f"line {line}: .*{sentence}"):
        SampleMarket(file)


def test_the_bundled_market_is_whole():
    market = SampleMarket(SAMPLE_FILE)
    assert len(market.bars) == 251
    assert {len(closes) for closes in market.closes.values()} == {251}
