"""An SVG becomes the pixels that it says, and what was drawn is kept until it is damaged."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from nondual.data.svg import drawn, kept, renderer, rgb


def svg(body: str, width: str = "8", height: str = "8", box: str = "0 0 8 8") -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="{box}">{body}</svg>'


LEFT = '<rect width="4" height="8" fill="#ff0000"/>'


def test_a_half_of_a_square_by_hand():
    picture = drawn(svg(LEFT), 8)
    assert picture.shape == (3, 8, 8) and picture.dtype == torch.uint8 and picture.is_contiguous()
    assert picture[0].unique().tolist() == [255]  # red, and white
    assert torch.equal(picture[1], torch.tensor([0] * 4 + [255] * 4, dtype=torch.uint8).expand(8, 8))
    assert torch.equal(picture[1], picture[2])


def test_half_transparent_is_half_white():
    assert set(drawn(svg('<rect width="8" height="8" fill-opacity=".5"/>'), 8).unique().tolist()) <= {127, 128}


@pytest.mark.parametrize("width, height", [(8, 2), (2, 8)])
def test_what_is_not_square_stands_in_the_middle(width, height):
    shape = f'<rect width="{width}" height="{height}"/>'
    picture = drawn(svg(shape, width, height, f"0 0 {width} {height}"), 8)[0]
    rows = picture if width > height else picture.T
    assert (rows[3:5] == 0).all() and (rows[:3] == 255).all() and (rows[5:] == 255).all()


def test_millimetres_and_an_empty_margin():
    """A small square on a page of A4 fills the picture when it is cropped."""
    page = svg('<rect x="10" y="10" width="5" height="5"/>', "210mm", "297mm", "0 0 210 297")
    assert (drawn(page, 16) == 255).float().mean() > 0.9
    cropped = np.frombuffer(rgb(page, 16, crop=True), np.uint8)
    assert cropped.size == 16 * 16 * 3 and (cropped < 60).mean() > 0.9
    with pytest.raises(ValueError, match="nothing is drawn"):
        rgb(svg(""), 16, crop=True)


def test_text_is_not_drawn_since_fonts_differ():
    assert (drawn(svg('<text y="7">M</text>'), 8) == 255).all()


@pytest.mark.parametrize("bad", ["", "no svg", "<svg", svg("", "0", "0")])
def test_what_is_no_svg_is_refused(bad):
    with pytest.raises(ValueError):
        drawn(bad, 8)


def test_without_the_renderer_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    for ask in (lambda: drawn(svg(LEFT), 8), renderer):
        with pytest.raises(ImportError, match=r"resvg_py is needed to draw: pip install 'nondual\[pictures\]'"):
            ask()


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A function that makes arrays, and a list of its calls; the cache is empty."""
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    calls = []

    def make():
        calls.append(1)
        return {"a": np.arange(1000, dtype=np.uint8).reshape(-1, 10), "b": np.array([True, False])}

    return make, calls


def test_it_is_made_once(counted, tmp_path):
    make, calls = counted
    for _ in range(3):
        found = kept("name", make)
        assert found.keys() == {"a", "b"} and (found["a"] == make()["a"]).all()
    assert len(calls) == 4  # three for the comparison, and one that was kept
    assert [file.name for file in tmp_path.rglob("*.npz")] == ["name.npz"]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "another file"])
def test_what_is_damaged_is_made_again(counted, tmp_path, damage):
    make, calls = counted
    kept("name", make)
    (file,) = tmp_path.rglob("*.npz")
    data = file.read_bytes()
    middle = data.index(b"a.npy") + 60
    changed = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    file.write_bytes({"cut": data[:-40], "changed": changed, "empty": b"", "another file": b"text"}[damage])
    assert (kept("name", make)["b"] == [True, False]).all() and len(calls) == 2
    assert file.read_bytes() == data


def test_two_processes_at_once_keep_one_whole_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    code = (
        "import numpy as np\nfrom nondual.data.svg import kept\n"
        "for i in range(20): print(kept(f'n{i}', lambda: {'a': np.arange(9000)})['a'].sum())"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in both:
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0 and set(out.split()) == {str(sum(range(9000)))}
    finally:
        for process in both:
            process.kill()
    assert len(list(tmp_path.rglob("*"))) == 21
