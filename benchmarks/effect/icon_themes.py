"""Icon themes of Debian as a second set of style shifts: one name, drawn by many hands.

Run: apt-get install --no-install-recommends librsvg2-bin PACKAGES  (`--packages` lists them)
     python benchmarks/effect/icon_themes.py --output outputs/effect/icons
     python benchmarks/effect/features.py --corpora icons --towers lite0
Themes of the freedesktop specification draw the same icon names. What is kept are the names that at
least 8 of the themes draw; the caption is the name ("document open recent"). A theme is a gallery.
gnome, mate and Adwaita share drawings: they are one family. Nothing was ever chosen on these.

It writes `validation.parquet` (`image`, 64 px on white; `label`, `concept`: the name, `style`: the
theme, `family`, `license`, `package`), which `ImageTextDataset` reads, and `ATTRIBUTION.md` with
the packages, their versions and licences.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import datasets
from PIL import Image
from tqdm.auto import tqdm

from features import BUILT

ICONS, ABOUT = Path("/usr/share/icons"), Path("/usr/share/doc")
SIDE, LEAST_THEMES = 64, 8
CONTEXTS = {
    *("actions", "apps", "categories", "devices", "emblems", "emotes", "mimetypes", "mimes"),
    *("places", "status"),
}


@dataclass(frozen=True)
class Theme:
    """One theme: its folder, its Debian package, and the themes that it shares drawings with."""

    folder: str
    package: str
    family: str


THEMES = (
    Theme("Adwaita", "adwaita-icon-theme", "gnome"),
    Theme("gnome", "gnome-icon-theme", "gnome"),
    Theme("mate", "mate-icon-theme", "gnome"),
    Theme("oxygen", "oxygen-icon-theme", "oxygen"),
    Theme("breeze", "breeze-icon-theme", "breeze"),
    Theme("Papirus", "papirus-icon-theme", "papirus"),
    Theme("elementary-xfce", "elementary-xfce-icon-theme", "elementary"),
    Theme("Tango", "tango-icon-theme", "tango"),
    Theme("Numix", "numix-icon-theme", "numix"),
    Theme("Faenza", "faenza-icon-theme", "faenza"),
    Theme("Moka", "moka-icon-theme", "moka"),
)


# ---- names and files --------------------------------------------------------------------------


def icon_name(path: Path) -> str | None:
    """The icon's name by its path inside a theme; None for what is no coloured icon."""
    folders = {part.lower() for part in path.parts[:-1]}
    symbolic = "symbolic" in folders or "symbolic" in path.stem.split(".")[-1].split("-")
    drawn = path.suffix in (".png", ".svg") and bool(folders & CONTEXTS)
    return path.stem if drawn and not symbolic else None


def caption(name: str) -> str:
    """A name as a text: `document-open-recent` is "document open recent"."""
    return re.sub(r"[-_.\s]+", " ", name).strip()


def drawn_for(path: Path) -> int:
    """The size in pixels that an icon was drawn for; 0 for one of any size."""
    for part in path.parts[:-1]:
        if found := re.fullmatch(r"(\d+)(?:x\d+)?(?:@(\d)x?)?", part):
            return int(found[1]) * int(found[2] or 1)
    return 0


def fitting(paths: Iterable[Path]) -> Path:
    """Of one name's files the one to take: the smallest that needs no enlarging, else the largest.

    A drawing of any size counts as larger than all others.
    """
    by_size = sorted(paths, key=lambda path: (drawn_for(path) or 10**6, str(path)))
    large = [path for path in by_size if (drawn_for(path) or 10**6) >= SIDE]
    return large[0] if large else by_size[-1]


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Name → the file to take, of all paths inside a theme."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        if (name := icon_name(path)) is not None:
            files[name].append(path)
    return {name: fitting(found) for name, found in files.items()}


def common_names(themes: Iterable[Iterable[str]], least: int = LEAST_THEMES) -> list[str]:
    """Names that at least so many themes draw, in alphabetical order."""
    counts = Counter(name for names in themes for name in set(names))
    return sorted(name for name, count in counts.items() if count >= least)


def own_pictures(pictures: Mapping[str, bytes], aliases: Mapping[str, str]) -> dict[str, bytes]:
    """Leaves out all but one of the names that a theme draws alike.

    Args:
        pictures: Name → PNG.
        aliases: Name → the name of the file that it links to, itself if that is no link.

    Returns:
        The same, with one name per picture: the file's own where there is one.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(pictures):
        alike[sha256(pictures[name]).hexdigest()].append(name)
    kept = (next((n for n in names if aliases[n] == n), names[0]) for names in alike.values())
    return {name: pictures[name] for name in sorted(kept)}


# ---- licences ---------------------------------------------------------------------------------


def licences(copyright_file: str, folder: str) -> str:
    """The licences of a theme's drawings by its package's machine-readable copyright file.

    Those of packaging and translations do not count. In alphabetical order; "see copyright file" if
    it is not machine-readable.

    Args:
        copyright_file: Its text.
        folder: Of the theme, which may have a paragraph of its own.
    """
    found = set()
    for paragraph in copyright_file.split("\n\n"):
        fields = dict(re.findall(r"^(Files|License):[ \t]*(.*(?:\n[ \t]+\S.*)*)", paragraph, re.M))
        drawn = [
            pattern
            for pattern in fields.get("Files", "").split()
            if pattern == "*" or pattern.startswith(f"{folder}/")
        ]
        if drawn and fields.get("License"):
            found.add(fields["License"].splitlines()[0].strip())
    return "; ".join(sorted(found)) or "see copyright file"


def version(package: str) -> str:
    """The installed version of a Debian package."""
    query = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout


# ---- pictures ---------------------------------------------------------------------------------


def picture(file: Path) -> bytes:
    """An icon as a PNG of 64 px on white."""
    if file.suffix == ".svg":
        side = ["--width", str(SIDE), "--height", str(SIDE), "--keep-aspect-ratio"]
        command = ["rsvg-convert", *side, str(file)]
        image = Image.open(
            io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
        )
    else:
        image = Image.open(file)
    out = io.BytesIO()
    on_white(image).save(out, "PNG")
    return out.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """A square of 64 px, the icon in the middle, white where it is transparent."""
    icon = image.convert("RGBA")
    scale = SIDE / max(icon.size)
    icon = icon.resize(
        [max(1, round(side * scale)) for side in icon.size], Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(icon, ((SIDE - icon.width) // 2, (SIDE - icon.height) // 2))
    return square.convert("RGB")


def rows_of(theme: Theme, files: Mapping[str, Path], names: list[str]) -> list[dict]:
    """Rows of a theme: one per picture that stands for a single name."""
    root = ICONS / theme.folder
    chosen = [name for name in names if name in files]
    bar = tqdm(chosen, theme.folder, leave=False)
    pictures = {name: picture(root / files[name]) for name in bar}
    aliases = {name: (root / files[name]).resolve().stem for name in chosen}
    text = (ABOUT / theme.package / "copyright").read_text(encoding="utf-8")
    about = licences(text, theme.folder)
    common = {"style": theme.folder, "family": theme.family, "license": about}
    return [
        {"image": {"bytes": png, "path": None}, "label": caption(name), "concept": name}
        | {**common, "package": theme.package}
        for name, png in own_pictures(pictures, aliases).items()
    ]


def attribution(rows: list[dict]) -> str:
    """Which package, in which version and under which licences, each theme comes from."""
    lines = ["| theme | icons | package | version | licences |", "|---|---:|---|---|---|"]
    for theme in THEMES:
        own = [row for row in rows if row["style"] == theme.folder]
        cells = (theme.folder, len(own), theme.package, version(theme.package), own[0]["license"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=BUILT / "icons")
    parser.add_argument("--packages", action="store_true", help="print what has to be installed")
    args = parser.parse_args()
    if args.packages:
        print(*(theme.package for theme in THEMES))
        return
    files = {}
    for theme in THEMES:
        root = ICONS / theme.folder
        if not root.is_dir():
            raise SystemExit(f"{root} is missing. Install {theme.package}.")
        found = (path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file())
        files[theme] = by_name(found)
    names = common_names(files.values())
    rows = [row for theme in THEMES for row in rows_of(theme, files[theme], names)]
    left = set(common_names([r["concept"] for r in rows if r["style"] == t.folder] for t in THEMES))
    rows = [row for row in rows if row["concept"] in left]
    texts = ("label", "concept", "style", "family", "license", "package")
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in texts}}
    args.output.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(str(args.output / "validation.parquet"))
    (args.output / "ATTRIBUTION.md").write_text(attribution(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} icons, {len(left)} names.\n\n{attribution(rows)}")


if __name__ == "__main__":
    main()
