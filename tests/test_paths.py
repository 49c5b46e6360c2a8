"""Paths of images are relative to the file that names them, in every format and column."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pico_hf.data.loading import load_image_text

COLOURS = {"reds": (255, 0, 0), "blues": (0, 0, 255)}
STRINGS = {
    "string": pa.array,
    "large": lambda values: pa.array(values, pa.large_string()),
    "view": lambda values: pa.array(values, pa.string_view()),
    "dictionary": lambda values: pa.array(values).dictionary_encode(),
    "large dictionary": lambda values: pa.array(values, pa.large_string()).dictionary_encode(),
    "struct": lambda values: pa.array([{"bytes": None, "path": value} for value in values]),
}


def write(file, names: list[str], column: str = "image", kind: str = "string") -> None:
    """Rows of an image path and a caption that says in which folder the file lies."""
    rows = {column: names, "caption": [f"{file.parent.name} {name}" for name in names]}
    if file.suffix == ".parquet":
        pq.write_table(pa.table({**rows, column: STRINGS[kind](names)}), file)
    elif file.suffix in (".csv", ".tsv"):
        mark = "\t" if file.suffix == ".tsv" else ","
        lines = [mark.join(row) for row in zip(*rows.values(), strict=True)]
        file.write_text("\n".join([mark.join(rows), *lines]) + "\n")
    else:
        lines = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        text = json.dumps(lines) if file.suffix == ".json" else "\n".join(map(json.dumps, lines))
        file.write_text(text)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders, each with its own `0.png` and `1.png`; the working folder has green ones."""
    for name, colour in {**COLOURS, "here": (0, 255, 0)}.items():
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8 + number), colour).save(tmp_path / name / f"{number}.png")
    monkeypatch.chdir(tmp_path / "here")
    return [tmp_path / name for name in COLOURS]


def check(table: datasets.Dataset) -> None:
    """Every caption names the folder whose colour its image has."""
    assert len(table) == 4
    for row in table:
        folder, name = row["captions"][0].split()
        assert row["image"].getpixel((0, 0)) == COLOURS[folder]
        assert f"{row['image'].size[1] - 8}.png" == name


@pytest.mark.parametrize("column", ["image", "file_name", "where"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_two_files_in_two_folders_find_their_own_images(folders, suffix, column):
    files = [folder / f"rows.{suffix}" for folder in folders]
    for file in files:
        write(file, ["0.png", "1.png"], column)
    named = {"image_column": column} if column == "where" else {}
    check(load_image_text(files=files, **named))


@pytest.mark.parametrize("kind", STRINGS)
def test_parquet_of_any_writer_names_images_relative_to_itself(folders, kind):
    files = [folder / "rows.parquet" for folder in folders]
    for file in files:
        write(file, ["0.png", "1.png"], "photo", kind)
    check(load_image_text(files=files))


def test_files_of_several_kinds_are_read_together(folders):
    files = [folders[0] / "rows.csv", folders[1] / "rows.parquet"]
    for file in files:
        write(file, ["0.png", "1.png"])
    check(load_image_text(files=files))


def test_files_whose_columns_differ_in_type_are_refused_with_the_difference(folders):
    files = [folders[0] / "rows.csv", folders[1] / "rows.parquet"]
    write(files[0], ["0.png"])
    table = pa.table({"image": ["0.png"], "caption": [["a", "b"]]})
    pq.write_table(table, files[1])
    with pytest.raises(ValueError, match=r"`files` must have columns of the same types.*caption"):
        load_image_text(files=files)


def test_the_working_folder_is_that_of_a_file_in_it(folders):
    write(folders[0].parent / "here" / "rows.csv", ["0.png"])
    table = load_image_text(files="rows.csv")
    assert table[0]["image"].getpixel((0, 0)) == (0, 255, 0)


def test_absolute_and_upward_paths_stay_what_they_are(folders):
    names = ["0.png", str(folders[0] / "1.png"), "../blues/1.png"]
    write(folders[0] / "rows.csv", names)
    table = load_image_text(files=folders[0] / "rows.csv")
    found = [(row["image"].getpixel((0, 0)), row["image"].size[1]) for row in table]
    assert found == [((255, 0, 0), 8), ((255, 0, 0), 9), ((0, 0, 255), 9)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_imagefolder_may_have_metadata_in_each_of_its_folders(folders, suffix):
    root = folders[0].parent
    for image in (root / "here").iterdir():
        image.unlink()
    for folder in folders:
        write(folder / f"metadata.{suffix}", ["0.png", "1.png"], "file_name")
    check(load_image_text(files=root))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_data_set_folder_of_tables_names_images_relative_to_each(folders, suffix):
    root = folders[0].parent / "set"
    for name in ("train", "validation"):
        (root / name).mkdir(parents=True)
    for folder, name in zip(folders, ("train", "validation"), strict=True):
        for image in folder.glob("*.png"):
            image.rename(root / name / image.name)
        write(root / name / f"{name}.{suffix}", ["0.png", "1.png"], "where")
    for name, colour in zip(("train", "validation"), COLOURS.values(), strict=True):
        table = load_image_text(str(root), split=name, image_column="where")
        assert [row["image"].getpixel((0, 0)) for row in table] == [colour] * 2
    part = load_image_text(str(root), split="train[1:]", image_column="where")
    assert [row["image"].size[1] for row in part] == [9]


def test_an_image_that_is_not_there_is_named_by_row_and_path(folders):
    write(folders[0] / "rows.csv", ["0.png", "lost.png"])
    with pytest.raises(ValueError, match=r"Row 1 .*reds/lost\.png.*`skip_bad_images=True`"):
        load_image_text(files=folders[0] / "rows.csv")


def test_a_null_image_in_a_file_is_named_by_its_row_and_can_be_skipped(folders):
    lines = [{"image": "0.png", "caption": "a"}, {"image": None, "caption": "b"}]
    file = folders[0] / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"Row 1 has an image that cannot be read \(there is none"):
        load_image_text(files=file)
    assert list(load_image_text(files=file, skip_bad_images=True)["captions"]) == [["a"]]


def test_nothing_but_bad_images_is_refused_even_when_they_may_be_skipped(folders):
    write(folders[0] / "rows.csv", ["lost.png", "gone.png"])
    with pytest.raises(ValueError, match=r"Row 0 .*and so has every other row.*`image_column`"):
        load_image_text(files=folders[0] / "rows.csv", skip_bad_images=True)


def test_a_file_of_another_kind_is_answered_with_the_kinds_there_are(folders):
    (folders[0] / "rows.txt").write_text("a")
    with pytest.raises(ValueError, match=r"files of these kinds: .*\.tsv\. Got \.txt"):
        load_image_text(files=folders[0] / "rows.txt")
