"""The progress bar on a terminal. That there is none where the output is piped, test_command.py sees."""

import sys

from nondual.store.command import main


def test_on_a_terminal_there_is_a_bar(index, monkeypatch, tiny, capsys):
    index("cut")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main({"tiny": tiny}, ["tiny"]) == 0
    assert "tiny:   0%|" in capsys.readouterr().err
