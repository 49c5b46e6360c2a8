"""The pure parts of the icon themes: which files, which names, which pictures, which licences."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import icon_themes


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("48x48/actions/document-open-recent.png", "document-open-recent"),
        ("base/48x48/mimetypes/text-x-generic.png", "text-x-generic"),
        ("actions/22/list-add.svg", "list-add"),
        ("scalable/actions/list-add-symbolic.svg", None),
        ("scalable/actions/pan-start-symbolic-rtl.svg", None),
        ("64x64/actions/list-add-symbolic.symbolic.png", None),
        ("symbolic/actions/list-add.svg", None),
        ("48x48/animations/process-working.png", None),
        ("actions/index.theme", None),
    ],
)
def test_names_are_those_of_coloured_icons(path, name):
    assert icon_themes.icon_name(Path(path)) == name


def test_a_caption_is_the_name_as_words():
    assert icon_themes.caption("document-open-recent") == "document open recent"
    assert icon_themes.caption("x-office_document") == "x office document"


@pytest.mark.parametrize(
    ("path", "size"),
    [
        ("48x48/places/a.png", 48),
        ("places/16/a.svg", 16),
        ("32x32@2x/places/a.png", 64),
        ("actions/22@2x/a.svg", 44),
        ("scalable/places/a.svg", 0),
    ],
)
def test_the_size_is_read_off_the_folders(path, size):
    assert icon_themes.drawn_for(Path(path)) == size


def test_the_smallest_file_that_needs_no_enlarging_is_taken():
    paths = [Path(f"{side}x{side}/apps/a.png") for side in (16, 48, 64, 128)]
    assert icon_themes.fitting(paths) == paths[2]
    assert icon_themes.fitting(paths[:2]) == paths[1]
    drawing = Path("scalable/apps/a.svg")
    assert icon_themes.fitting([*paths[:2], drawing]) == drawing
    assert icon_themes.by_name([*paths, Path("apps/index.theme")]) == {"a": paths[2]}


def test_names_are_kept_that_enough_themes_draw():
    themes = [["a", "b", "a"], ["a", "c"], ["a", "b"]]
    assert icon_themes.common_names(themes, least=2) == ["a", "b"]


def test_of_names_that_are_drawn_alike_the_file_s_own_is_kept():
    pictures = {"go-home": b"house", "user-home": b"house", "mail": b"letter", "x": b"house"}
    aliases = {"go-home": "user-home", "user-home": "user-home", "mail": "mail", "x": "user-home"}
    assert icon_themes.own_pictures(pictures, aliases) == {"mail": b"letter", "user-home": b"house"}


def test_licences_are_those_of_the_drawings():
    text = """Format: machine-readable

Files: src/*.svg
       mate/*
Copyright: somebody
License: LGPL-3+ or CC-BY-SA

Files: po/*.po
License: GPL-2+

Files: debian/*
License: GPL-3+

License: MIT
 text of it"""
    assert icon_themes.licences(text, "mate") == "LGPL-3+ or CC-BY-SA"
    assert icon_themes.licences(text.replace("mate/*", "*"), "other") == "LGPL-3+ or CC-BY-SA"
    assert icon_themes.licences("All rights belong to somebody.", "mate") == "see copyright file"


def test_pictures_are_squares_on_white(tmp_path):
    half = Image.new("RGBA", (16, 8), (255, 0, 0, 255))
    half.save(tmp_path / "icon.png")
    with Image.open(BytesIO(icon_themes.picture(tmp_path / "icon.png"))) as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")
        assert image.getpixel((32, 32)) == (255, 0, 0)
        assert image.getpixel((32, 2)) == (255, 255, 255)
    clear = icon_themes.on_white(Image.new("RGBA", (5, 5), (0, 0, 0, 0)))
    assert clear.getextrema() == ((255, 255),) * 3


def test_the_families_that_share_drawings_are_one():
    shared = {theme.folder for theme in icon_themes.THEMES if theme.family == "gnome"}
    assert shared == {"Adwaita", "gnome", "mate"}
    assert len({theme.folder for theme in icon_themes.THEMES}) == 11
