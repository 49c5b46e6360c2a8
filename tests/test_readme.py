"""What the README says of the code is what the code says of itself."""

from pathlib import Path

from pico_hf.encoders.table import supported_encoders_table

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- encoders: begin -->", "<!-- encoders: end -->"


def test_the_list_of_encoders_is_the_table():
    printed = README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    assert printed.strip() == supported_encoders_table(), (
        "Put the output of `python -c 'from pico_hf.encoders.table import *; "
        "print(supported_encoders_table())'` between the markers in README.md."
    )
