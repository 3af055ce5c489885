"""The report in a real browser: quiet, alone, usable by pointer, keyboard, phone, printer and screen reader."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from chromium import Browser, binary
from fullrun import IMAGE, SCRIPT, make_full_run

from reidctl.stages import report

pytestmark = pytest.mark.skipif(binary() is None, reason="no Chromium on the PATH (chromium, google-chrome)")

SEEN = "item => item.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})"
DETAILS = "document.querySelectorAll('details').forEach(item => { item.open = true })"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = make_full_run(tmp_path_factory.mktemp("full") / "r")
    report.run(run)
    return run.stage_dir("report") / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def complaints(browser):
    """Console messages, exceptions and the browser's own warnings."""
    said = [params for params in browser.named("Runtime.consoleAPICalled")]
    said += browser.named("Runtime.exceptionThrown")
    return said + [params["entry"] for params in browser.named("Log.entryAdded")]


def requests(browser):
    urls = [params["request"]["url"] for params in browser.named("Network.requestWillBeSent")]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.covers(231)
def test_the_page_is_quiet_and_asks_for_nothing_but_itself(chromium, page):
    chromium.open(page)
    chromium.run(DETAILS)
    chromium.run("document.querySelectorAll('.off').forEach(part => part.classList.remove('off'))")
    # Pictures wait until they are near; then every one of them must come.
    chromium.run("document.querySelectorAll('img').forEach(image => { image.loading = 'eager' })")
    chromium.run("Promise.all([...document.images].map(image => image.decode()))")
    assert complaints(chromium) == []
    assert requests(chromium) == [page.resolve().as_uri()]


def test_what_a_script_asks_for_is_refused_by_the_page_itself(chromium, page):
    chromium.open(page)
    tried = "fetch('http://127.0.0.1:9/x').then(() => 'sent', error => error.name)"
    assert chromium.run(tried) == "TypeError"
    chromium.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/i.png'}))")
    chromium.run("new Promise(done => setTimeout(done, 200))")
    text = " ".join(params["entry"]["text"] for params in chromium.named("Log.entryAdded"))
    assert "connect-src" in text and "img-src" in text and "Content Security Policy" in text
    assert not [params for params in chromium.named("Network.responseReceived") if "127.0.0.1" in str(params)]


def test_a_script_that_got_into_the_page_does_not_run(chromium, page, tmp_path):
    spoilt = tmp_path / "spoilt.html"
    bad = '<script>document.title = "ran"</script><img src="x" onerror=\'document.title = "ran"\'>'
    spoilt.write_text(page.read_text(encoding="utf-8").replace("</h1>", f"</h1>{bad}"), encoding="utf-8")
    chromium.open(spoilt)
    assert chromium.run("document.title") == "bdam on synthped"
    assert chromium.run("document.querySelector('button').ariaPressed") == "true"  # our own script still does


def test_captions_with_markup_are_text(chromium, page):
    chromium.open(page)
    assert chromium.run("document.title") == "bdam on synthped"
    shown = chromium.run("[...document.querySelectorAll('#maps blockquote')].map(item => item.textContent)")
    plain = [re.sub(r"\d(?=\D|$)", "", text) for text in shown]  # the numbers of the phrases stand in between
    assert any(SCRIPT in text for text in plain) and any(IMAGE in text for text in plain)
    assert chromium.run("document.querySelectorAll('script').length") == 1
    assert chromium.run("document.querySelectorAll('img[src=x], img[onerror]').length") == 0


def test_filters_of_ranked_lists_hide_and_show(chromium, page):
    chromium.open(page)
    kinds = f"[...document.querySelectorAll('#list-1 .query')].filter({SEEN}).map(item => item.dataset.kind)"
    everything = chromium.run(kinds)
    assert set(everything) == {"found", "missed"}
    chromium.click("[data-filter='list-1'] [data-show='missed']")
    assert set(chromium.run(kinds)) == {"missed"}
    pressed = "[...document.querySelectorAll(\"[data-filter='list-1'] button\")].map(item => item.ariaPressed)"
    assert chromium.run(pressed) == ["false", "false", "true"]
    chromium.click("[data-filter='list-1'] [data-show='all']")
    assert chromium.run(kinds) == everything


@pytest.mark.covers(193)
def test_the_maps_of_an_explainer_and_the_curves_of_a_fill_are_chosen_by_buttons(chromium, page):
    chromium.open(page)
    strips = f"[...new Set([...document.querySelectorAll('.strip')].filter({SEEN}).map(item => item.dataset.kind))]"
    assert chromium.run(strips) == ["gradcam"]
    chromium.click("[data-filter='explained'] [data-show='ppim']")
    assert chromium.run(strips) == ["ppim"]
    chromium.click("[data-filter='explained'] [data-show='all']")
    assert chromium.run(strips) == ["gradcam", "ppim", "random"]
    fills = f"[...document.querySelectorAll('.fill')].filter({SEEN}).map(item => item.dataset.kind)"
    assert chromium.run(fills) == ["mean"]
    chromium.click("[data-filter='fills'] [data-show='blur']")
    assert chromium.run(fills) == ["blur"]


def test_a_phrase_lights_its_maps_by_pointer_and_by_keyboard(chromium, page):
    chromium.open(page)
    lit = "[...document.querySelectorAll('.explained .lit')].map(item => item.tagName + item.dataset.phrase).sort()"
    assert chromium.run(lit) == []
    chromium.hover(".explained mark[data-phrase='2'], .explained mark")
    one = chromium.run(lit)
    assert len(one) == 4 and "MARK" in one[-1] and {item[-1] for item in one} == {one[0][-1]}  # a map by each explainer
    chromium.hover("h1")
    assert chromium.run(lit) == []
    chromium.run("document.querySelector('.explained mark').focus()")
    assert len(chromium.run(lit)) == 4


TIP = """(() => { const tip = document.querySelector('.tip'); return tip.hidden ? null :
    {text: tip.innerText, picture: tip.querySelector('img')?.naturalWidth ?? 0}; })()"""


@pytest.mark.covers(159, 231)
def test_a_point_of_the_map_shows_its_picture_and_person_by_pointer(chromium, page):
    chromium.open(page)
    assert chromium.run(TIP) is None
    point = ".cloud:nth-of-type(2) .pt:last-of-type"
    label = chromium.run(f"document.querySelector({point!r}).getAttribute('aria-label')")
    person = chromium.run(f"document.querySelector({point!r}).dataset.person")
    chromium.hover(point)
    chromium.run("new Promise(done => setTimeout(done, 50))")
    tip = chromium.run(TIP)
    assert label.split("; ")[0] in tip["text"] and person in tip["text"] and tip["picture"] > 0
    inside = (
        "(() => { const b = document.querySelector('.tip').getBoundingClientRect(); return b.right <= innerWidth })()"
    )
    assert chromium.run(inside)
    chromium.hover("h1")
    assert chromium.run(TIP) is None


@pytest.mark.covers(159, 231)
def test_the_map_is_one_stop_of_the_tab_key_and_arrows_go_from_point_to_point(chromium, page):
    chromium.open(page)
    stops = "[...document.querySelectorAll('.cloud > svg')].map(s => s.querySelectorAll('.pt[tabindex=\"0\"]').length)"
    assert chromium.run(stops) == [1, 1]
    chromium.run("document.querySelector('.space select').focus()")
    chromium.press("Tab")
    where = "document.activeElement.getAttribute('aria-label')"
    first = chromium.run(where)
    assert first.split("; ")[1] in chromium.run(TIP)["text"]
    seen = {first}
    for key in ("ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft") * 2:
        chromium.press(key)
        seen.add(chromium.run(where))
    assert len(seen) > 2 and chromium.run(stops) == [1, 1]
    assert chromium.run(where).split("; ")[1] in chromium.run(TIP)["text"]
    chromium.press("Escape")
    assert chromium.run(TIP) is None


def test_a_person_is_highlighted_by_choice_and_by_click(chromium, page):
    chromium.open(page)
    lit = "[...new Set([...document.querySelectorAll('.pt.lit')].map(item => item.dataset.person))]"
    chromium.run(
        "(() => { const pick = document.querySelector('.space select'); pick.value = 'synthped:3';"
        " pick.dispatchEvent(new Event('change')) })()"
    )
    assert chromium.run(lit) == ["synthped:3"]
    assert chromium.run("document.querySelectorAll('.pt.lit').length") == 9  # three images in three features
    faint = "getComputedStyle(document.querySelector('.pt:not(.lit)')).opacity"
    assert float(chromium.run(faint)) < 0.5
    chromium.click(".cloud .pt.lit")
    assert chromium.run(lit) == [] and float(chromium.run(faint)) == 1


@pytest.mark.parametrize("width", [390, 320, 820, 1280])
def test_nothing_makes_the_page_scroll_sideways(chromium, page, width):
    chromium.open(page, width=width, height=844)
    chromium.run(DETAILS)
    chromium.run("for (const part of document.querySelectorAll('.off')) part.classList.remove('off')")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    script = """(seen, width) => [...document.querySelectorAll('main *')].filter(seen)
        .filter(item => !item.closest('.scroll, pre, .hits'))
        .filter(item => item.getBoundingClientRect().right > width + 1).map(item => item.outerHTML.slice(0, 80))"""
    beyond = f"({script})({SEEN}, {width})"
    assert chromium.run(beyond) == []


def test_what_is_touched_on_a_phone_is_large_enough(chromium, page):
    chromium.open(page, width=390, height=844)
    small = f"""[...document.querySelectorAll('button, select, summary, nav a')].filter({SEEN})
        .filter(item => item.getBoundingClientRect().height < 24).map(item => item.textContent)"""
    assert chromium.run(small) == []


def test_dark_and_light_are_both_readable(chromium, page):
    grounds = {}
    for dark in (False, True):
        chromium.open(page, dark=dark)
        colours = colours_of(chromium)
        grounds[dark] = luminance(colours["paper"])
        for ground in ("paper", "card"):
            for ink in ("ink", "faint", "link"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (dark, ink, ground)
            for series in range(1, 9):
                assert contrast(colours[f"s{series}"], colours[ground]) >= 3, (dark, series, ground)
        assert contrast(colours["markink"], colours["mark"]) >= 4.5
        assert contrast(colours["ink"], colours["warn"]) >= 4.5
        for mark in ("right", "wrong"):
            assert contrast(colours["on"], colours[mark]) >= 4.5, (dark, mark)
    assert grounds[False] > 0.8 and grounds[True] < 0.05


def colours_of(browser):
    names = ["paper", "card", "ink", "faint", "link", "mark", "markink", "warn", "right", "wrong", "on"]
    names += [f"s{number}" for number in range(1, 9)]
    script = f"""{names}.map(name => {{ const item = document.createElement('i');
        item.style.color = `var(--${{name}})`; document.body.append(item);
        const found = getComputedStyle(item).color; item.remove(); return found }})"""
    found = browser.run(script)
    return {name: [int(part) for part in re.findall(r"\d+", text)[:3]] for name, text in zip(names, found, strict=True)}


def luminance(rgb):
    """Relative luminance of WCAG 2."""
    linear = [value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_everything_that_needs_a_name_has_one(chromium, page):
    chromium.open(page)
    chromium.run(DETAILS)
    chromium.run("for (const part of document.querySelectorAll('.off')) part.classList.remove('off')")
    chromium.call("Accessibility.enable")
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    chromium.call("Accessibility.disable")
    roles = {"image", "img", "button", "combobox", "link", "region", "figure", "graphics-symbol", "navigation", "table"}
    named = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in roles]
    nameless = [node["role"]["value"] for node in named if not node.get("name", {}).get("value", "").strip()]
    assert nameless == []
    found = {node["role"]["value"] for node in named}
    assert {"image", "button", "combobox", "region", "navigation"} <= found
    landmarks = [node["role"]["value"] for node in nodes if not node["ignored"] and "role" in node]
    assert landmarks.count("main") == landmarks.count("banner") == landmarks.count("contentinfo") == 1
    assert chromium.run("document.documentElement.lang") == "en"


def test_headings_leave_no_level_out(chromium, page):
    chromium.open(page)
    levels = chromium.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(item => Number(item.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_first_stop_of_the_tab_key_leads_past_the_navigation(chromium, page):
    chromium.open(page)
    chromium.press("Tab")
    assert chromium.run("document.activeElement.textContent") == "Skip to the content"
    assert chromium.run("document.activeElement.getBoundingClientRect().left") >= 0
    chromium.press("Enter")
    assert chromium.run("document.activeElement.id") == "main"


def test_paper_shows_what_a_filter_hides(chromium, page):
    chromium.open(page)
    chromium.click("[data-filter='list-1'] [data-show='missed']")
    hidden = f"""[...document.querySelectorAll('.query, .strip, .fill')].filter(item => !({SEEN})(item)).length"""
    assert chromium.run(hidden) > 0
    chromium.media("print")
    assert chromium.run(hidden) == 0
    gone = f"[...document.querySelectorAll('nav, .filter, .copying')].filter({SEEN}).length"
    assert chromium.run(gone) == 0
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    assert chromium.run("document.querySelectorAll('details:not([open]):not(.aside)').length") == 0
    chromium.run("dispatchEvent(new Event('afterprint'))")
    assert chromium.run("document.querySelectorAll('details:not([open])').length") > 0
    assert chromium.pdf().startswith(b"%PDF")


def test_no_table_is_cut_on_paper(chromium, page):
    # A4 less two margins of 14 mm, in CSS pixels.
    chromium.open(page, width=688, height=1000, media="print")
    chromium.run(DETAILS)
    wide = "[...document.querySelectorAll('table, .plot svg, pre')].filter(i => i.getBoundingClientRect().right > 689)"
    assert chromium.run(f"{wide}.map(item => item.outerHTML.slice(0, 120))") == []


def test_the_settings_are_copied_or_else_selected(chromium, page):
    chromium.open(page)
    chromium.click("[data-copy]")
    chromium.run("new Promise(done => setTimeout(done, 100))")
    said = chromium.run("document.querySelector('.copying [role=status]').textContent")
    assert said.startswith(("Copied", "Selected"))
    if said.startswith("Selected"):
        assert chromium.run("getSelection().toString()").startswith("seed: 3")


def test_without_scripts_everything_is_shown_and_nothing_is_offered_that_does_not_work(chromium, page):
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open_without_scripts(page)
        nodes = chromium.call("DOMSnapshot.captureSnapshot", computedStyles=["display"])
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    strings, tree = nodes["strings"], nodes["documents"][0]
    drawn = {tree["nodes"]["nodeName"][place] for place in tree["layout"]["nodeIndex"]}
    names = {strings[place] for place in drawn if place >= 0}
    assert "BUTTON" not in names and "SELECT" not in names and {"TABLE", "IMG", "circle", "MARK"} <= names
    strips = sum(
        "strip" in [strings[value] for value in tree["nodes"]["attributes"][place]]
        for place in tree["layout"]["nodeIndex"]
    )
    assert strips == 18  # six captions, three explainers
