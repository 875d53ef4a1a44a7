"""Who asks: the token stays in the tab, and what ends it is told."""

import re

from playwright.sync_api import Browser, expect

from apt_ray.data.folders import Category
from tests.serving.console.browser import page
from tests.serving.console.fleets import ConsoleFleet, tokens


def test_a_token_is_asked_for_and_kept_in_the_tab_alone(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    fleet.allow(tokens(boss=["operate", "inspect"]))
    with page(browser, fleet.url) as tab:
        tab.goto(f"/c/{category.name}/versions")
        token, enter = tab.get_by_label("Access token"), tab.get_by_role("button", name="Sign in")
        expect(token).to_be_focused()
        token.fill("wrong")
        enter.click()
        expect(tab.get_by_role("alert")).to_contain_text("The token is not known here")
        token.fill("boss")
        token.press("Enter")
        expect(tab.get_by_role("heading", name=category.name)).to_be_visible()
        assert "boss" not in tab.url
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, history.state])"
        assert "boss" not in tab.evaluate(kept)
        tab.reload()
        expect(token).to_be_visible()
        token.fill("boss")
        token.press("Enter")
        tab.get_by_role("button", name="Sign out").click()
        expect(token).to_be_visible()
        tab.evaluate("dispatchEvent(new PopStateEvent('popstate'))")
        expect(tab.get_by_role("heading", name=category.name)).to_have_count(0)


def test_a_token_that_ends_is_told_and_the_page_comes_back(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    fleet.allow(tokens(early=["operate", "inspect"]))
    with page(browser, fleet.url) as tab:
        tab.goto("/")
        tab.get_by_label("Access token").fill("early")
        tab.get_by_role("button", name="Sign in").click()
        tab.get_by_role("link", name=category.name).wait_for()
        fleet.allow(tokens(late=["operate", "inspect"]))
        expect(tab.get_by_role("alert")).to_contain_text("The token is not known here")
        tab.get_by_label("Access token").fill("late")
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.get_by_role("link", name=category.name)).to_be_visible()


def test_whoever_may_only_inspect_sees_the_list_alone(
    browser: Browser, fleet: ConsoleFleet, category: Category
) -> None:
    fleet.allow(tokens(line=["inspect"]))
    with page(browser, fleet.url) as tab:
        tab.goto("/")
        tab.get_by_label("Access token").fill("line")
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.get_by_role("link", name=category.name)).to_be_visible()
        expect(tab.get_by_role("columnheader")).to_have_count(2)
        expect(tab.get_by_text("Ready")).to_be_visible()
        tab.goto(f"/c/{category.name}/versions")
        tab.get_by_label("Access token").fill("line")
        tab.get_by_role("button", name="Sign in").click()
        expect(tab.get_by_role("alert")).to_contain_text(re.compile("scope operate"))
