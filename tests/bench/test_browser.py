"""The browser that other tests rely on: scripts run, and what they must not do is noticed."""

import pytest
from browser import Visits

GOOD = "<!doctype html><title>1</title><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='><p>{}</p>"
BAD = {
    "console.error('so it is')": "console, error: so it is",
    "undefined.x": "Cannot read properties",
    "fetch('http://127.0.0.1:9/x').catch(() => 0)": "request: http://127.0.0.1:9/x",
    "document.body.style.width = '2000px'": "of which 360 show",
}


def test_script_runs(visit, tmp_path):
    page = tmp_path / "a page.html"
    page.write_text(GOOD + "<script>document.title += 1; document.querySelector('p').textContent = innerWidth</script>")
    seen = visit(page, width=360)
    assert seen.title() == "11" and seen.inner_text("p") == "360"


@pytest.mark.parametrize("script", BAD)
def test_misbehaviour_is_noticed(script, browser, tmp_path):
    (tmp_path / "a.html").write_text(f"{GOOD}<script>{script}</script>")
    visits = Visits(browser)
    visits(tmp_path / "a.html", width=360).wait_for_timeout(100)
    assert any(BAD[script] in complaint for complaint in visits.complaints())
    visits.close()
