"""What the guide to encoders says of the code is what the code says of itself."""

from pathlib import Path

from pico_hf.encoders.table_markdown import supported_encoders_table

PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
BEGIN, END = "<!-- encoders: begin -->", "<!-- encoders: end -->"


def test_the_list_of_encoders_is_the_table():
    printed = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert printed.strip() == supported_encoders_table(), (
        "Put the output of `python -c 'from pico_hf.encoders.table_markdown import *; "
        "print(supported_encoders_table())'` between the markers in docs/encoders.md."
    )
