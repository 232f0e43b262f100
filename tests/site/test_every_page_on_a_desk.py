"""Every page of the built site in Chromium, as wide as a desk: loaded once, and looked at in both palettes."""

import pytest
from looking import faults_of_pages

PARTS = 6  # the pages are looked at in so many tests, each within the time limit of one


@pytest.mark.browser
@pytest.mark.timeout(600)  # many pages a test, on a busy machine
@pytest.mark.parametrize("part", range(PARTS))
def test_every_page_reads_well(browser, site, pages, part):
    faults = faults_of_pages(browser, site, list(pages)[part::PARTS], "desktop")
    assert not faults, "\n".join(f"{name}: {fault}" for name, found in faults.items() for fault in found)
