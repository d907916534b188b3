"""A place as people write it is the one that is there; what cannot be is refused with its cause."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from deltaclip.base.errors import UserError
from deltaclip.base.options import setting
from deltaclip.base.places import check_places, understood_places
from deltaclip.cli import main


@dataclass(frozen=True, kw_only=True)
class Named:
    data: str | None = setting(None, help="", names="data")
    several: list[str] | None = setting(None, help="", names="data")
    backbone: str | None = setting(None, help="", names="backbone")
    cache: Path | None = setting(None, help="", names="cache")
    image_root: Path | None = setting(None, help="", names="folder")
    out: Path | None = setting(None, help="", names="file")
    prompt: str | None = setting(None, help="")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "in there").mkdir()
    (tmp_path / "in there" / "t.csv").write_text("image,prompt\n")
    monkeypatch.chdir(tmp_path / "in there")
    return tmp_path


def understood(**given):
    (found,) = understood_places(Named, given).values()
    return found


def test_texts_that_mean_what_is_there(home):
    there = home / "in there" / "t.csv"
    address = there.as_uri()
    assert "%20" in address
    for text in (str(there), f'"{there}"', f"'{there}' ", str(there).replace("/", "\\"), address, "~/in there/t.csv"):
        assert Path(understood(data=text)) == there, text
        assert understood(cache=Path(text)) == there, text
    assert understood(image_root=Path("~/in there")) == home / "in there"
    assert understood(several=["A=~/in there", "B=x"]) == [f"A={home}/in there", "B=x"]
    assert understood(backbone="local-dir:~/x") == f"local-dir:{home}/x"


def test_what_is_to_be_made_is_at_home_too_and_never_in_a_folder_called_tilde(home):
    assert understood(out=Path("~/new/c.h5")) == home / "new" / "c.h5"
    assert understood(out=Path("a\\b.h5")) == Path("a\\b.h5")  # a name like any other


def test_what_stays_as_it_stands(home):
    for text in ("demo", "agiqa-3k:x", "https://host/~me/t.csv", "C:\\x\\t.csv", "a~b.csv", "{000..002}.tar"):
        assert understood(data=text) == text
    assert understood(prompt="~/a prompt") == "~/a prompt"
    (home / "in there" / "~").mkdir()
    assert understood(image_root=Path("~")) == Path("~")  # which is there under that name
    assert understood(cache=None) is None


def test_a_path_of_windows_is_no_adapter(home, capsys):
    with pytest.raises(UserError) as caught:
        check_places(Named(data="C:\\Users\\me\\t.csv"))
    line = "C:\\Users\\me\\t.csv: is a path of Windows, and not here; give it as it is on this machine"
    assert str(caught.value) == line
    for data, words in (
        ("T.CSV", "T.CSV: no such file; there is t.csv in that folder"),
        ("t.tsv", "t.tsv: no such file; there is t.csv in that folder"),
        ("ftp://host/t.csv", "ftp://host/t.csv: is at an address of a kind that is not fetched; download it, or give "),
    ):
        with pytest.raises(SystemExit):
            main(["data", "check", data])
        assert capsys.readouterr().err.startswith(f"deltaclip: {words}")
