"""Files are read out of wheels, npm tarballs and Debian packages by their exact names, within limits."""

import gzip
import io
import sys
import tarfile
import zipfile

import pytest

from nondual.store import archives, members
from nondual.store.archives import BadArchive, from_debian, from_tarball, from_wheel


def tar(mode: str, *members: tuple[str, bytes | None]) -> bytes:
    """A tar file; a member without content is a link out of the archive."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode=mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "../../etc/passwd"
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return whole.getvalue()


def ar(*parts: tuple[str, bytes]) -> bytes:
    whole = b"!<arch>\n"
    for name, content in parts:
        whole += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        whole += content + b"\n" * (len(content) % 2)
    return whole


@pytest.fixture
def file(tmp_path):
    """A function: an archive with this content."""

    def write(content: bytes):
        (tmp_path / "archive").write_bytes(content)
        return tmp_path / "archive"

    return write


@pytest.mark.parametrize("compression", ["xz", "gz", ""])
def test_a_debian_package_by_hand(file, compression):
    data = tar(f"w:{compression}", ("./usr/a", b"one"), ("./usr/b", b"two"), ("./usr/link", None))
    name = f"data.tar.{compression}".rstrip(".")
    deb = file(ar(("debian-binary", b"2.0\n"), ("odd/", b"odd"), (name, data)))
    assert from_debian(deb, ["usr/b"]) == {"usr/b": b"two"}
    assert from_debian(deb, [name, "usr/a", "odd"]) == {name: data, "usr/a": b"one", "odd": b"odd"}
    assert list(members(data, compression).items()) == [("usr/a", b"one"), ("usr/b", b"two")]
    with pytest.raises(BadArchive, match="There is no item named 'usr/link' in the archive"):
        from_debian(deb, ["usr/link"])


def test_python_itself_reads_what_the_system_s_tool_packs(file, tmp_path):
    """`ar` of GNU binutils, where it is installed, ends names with a slash."""
    import shutil
    import subprocess

    if not shutil.which("ar"):
        pytest.skip("GNU ar is not installed")
    (tmp_path / "data.tar.xz").write_bytes(tar("w:xz", ("./x", b"content")))
    command = ["ar", "r", "made.deb", "data.tar.xz"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert from_debian(tmp_path / "made.deb", ["x"]) == {"x": b"content"}


def test_a_tarball_and_a_wheel(file, tmp_path):
    tarball = file(tar("w:gz", ("package/a", b"one"), ("/absolute", b"x"), ("../up", b"y"), ("package/l", None)))
    assert from_tarball(tarball, ["package/a"]) == {"package/a": b"one"}
    with pytest.raises(BadArchive, match="'package/l'"):
        from_tarball(tarball, ["package/a", "package/l"])
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a", "one")
    assert from_wheel(tmp_path / "a.whl", ["a"]) == {"a": b"one"}
    with pytest.raises(BadArchive, match="There is no item named 'b' in the archive"):
        from_wheel(tmp_path / "a.whl", ["b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.whl", "archive"]  # and nothing was extracted


def test_what_unpacks_to_more_than_the_limit_is_refused(file, monkeypatch, tmp_path):
    monkeypatch.setattr(archives, "LIMIT", 1000)
    data = tar("w:gz", ("a", bytes(600)), ("b", bytes(600)))
    with pytest.raises(BadArchive, match="unpacks to more than 1000 bytes"):
        from_tarball(file(data), ["a"])
    with pytest.raises(BadArchive, match="unpacks to more than 1000 bytes"):
        members(data, "gz")
    with pytest.raises(BadArchive, match="a part of it has more than 1000 bytes"):
        from_debian(file(ar(("data.tar", bytes(2000)))), ["data.tar"])
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(2000))
    with pytest.raises(BadArchive, match="'a' unpacks to more than 1000 bytes"):
        from_wheel(tmp_path / "a.whl", ["a"])


@pytest.mark.parametrize(
    "content, says",
    [
        (b"PK", "it is no Debian package"),
        (ar(("debian-binary", b"2.0\n")), r"a Debian package without data\.tar"),
        (ar(("data.tar.xz", b"x"))[:40], "its ar header at byte 8 cannot be read"),
        (ar(("data.tar.xz", b"12345678"))[:-3], "its ar header at byte 8 cannot be read"),
        (ar(("data.tar.xz", b"no xz")), "its tar file cannot be read"),
        (ar(("data.tar.gz", gzip.compress(b"no tar", mtime=0))), "its tar file cannot be read"),
        (ar(("data.tar.gz", tar("w:gz", ("x", b"y"))[:-9])), "its tar file cannot be read|There is no item named 'z'"),
        (ar(("data.tar.lzo", b"x")), "its compression must be xz, gz or zst, got 'lzo'"),
    ],
)
def test_a_broken_debian_package_says_what_is_wrong(file, content, says):
    with pytest.raises(BadArchive, match=says):
        from_debian(file(content), ["z"])


def test_other_broken_archives(file):
    with pytest.raises(BadArchive, match="its tar file cannot be read"):
        from_tarball(file(b"no gzip"), ["a"])
    with pytest.raises(BadArchive, match="not a zip file"):
        from_wheel(file(b"no zip"), ["a"])


def test_zstandard_is_read_from_python_3_14_on():
    if sys.version_info < (3, 14):
        with pytest.raises(BadArchive, match=r"Zstandard, which Python reads from version 3\.14 on"):
            members(b"", "zst")
        return
    from compression import zstd

    assert members(zstd.compress(tar("w", ("./a", b"one"))), "zst") == {"a": b"one"}
