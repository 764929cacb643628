"""Under which licence an adapter may go out, and what must go along."""

from __future__ import annotations

import pytest

from finetune.adapters.licensing import plan_licence
from finetune.errors import BadInput
from finetune.families.protocol import LicenceTerms

OPEN = LicenceTerms("apache-2.0", "Apache-2.0", "https://example.org/apache")
COMMUNITY = LicenceTerms("other", "maker-community", "https://example.org/licence", notice="Maker is licensed under ...", territory="European Union")
NAMED = LicenceTerms("other", "maker-community", "https://example.org/licence", naming="Maker Flux")
CLOSED = LicenceTerms("other", "research-only", "https://example.org/licence", publishable=False)


def test_an_open_base_leaves_the_choice():
    assert plan_licence(OPEN, None, "me/style").identifier == "apache-2.0"
    chosen = plan_licence(OPEN, "cc-by-4.0", "me/style")
    assert (chosen.identifier, chosen.base_name, chosen.needs_copy) == ("cc-by-4.0", "Apache-2.0", False)


def test_a_community_licence_goes_along_with_its_notice_and_territory():
    plan = plan_licence(COMMUNITY, None, "me/style")
    assert (plan.identifier, plan.name, plan.needs_copy, plan.territory) == ("other", "maker-community", True, "European Union")
    assert plan.notice.startswith("Maker is licensed")
    assert plan_licence(COMMUNITY, "maker-community", "me/style") == plan


@pytest.mark.parametrize(("terms", "wanted", "repo", "said"), [
    pytest.param(COMMUNITY, "mit", "me/style", "must be passed on", id="a freer licence than the base's"),
    pytest.param(CLOSED, None, "me/style", "does not allow publishing", id="no derived works"),
    pytest.param(NAMED, None, "me/style", "name contains", id="a name that is asked for"),
    pytest.param(None, None, "me/style", "not known", id="an unknown base"),
    pytest.param(OPEN, "MIT License", "me/style", "not a licence identifier", id="no identifier"),
    pytest.param(OPEN, "mit\nevil: yes", "me/style", "not a licence identifier", id="a line break"),
])
def test_what_the_base_does_not_allow_is_refused(terms, wanted, repo, said):
    with pytest.raises(BadInput, match=said):
        plan_licence(terms, wanted, repo)


def test_a_name_is_found_however_it_is_written():
    assert plan_licence(NAMED, None, "me/maker-flux_style").name == "maker-community"


def test_an_unknown_base_takes_the_licence_that_was_named():
    assert plan_licence(None, "mit", "me/style").identifier == "mit"


@pytest.mark.parametrize("terms", [None, OPEN])
def test_a_licence_of_ones_own_has_a_name_and_a_text(terms):
    """The card was called "other" and linked a LICENSE.txt that nobody had written."""
    plan = plan_licence(terms, "other", "me/style", "studio-licence-1.0")
    assert (plan.identifier, plan.name, plan.link, plan.own_text) == ("other", "studio-licence-1.0", "LICENSE.txt", True)
    for name in (None, "Studio Licence", "a\nb: c"):
        with pytest.raises(BadInput, match="no name|not a name"):
            plan_licence(terms, "other", "me/style", name)


def test_every_family_of_the_registry_has_terms_that_lead_to_a_plan_or_a_clear_refusal():
    from finetune.families import registry

    for name in registry.names():
        terms = registry.family(name).facts.licence
        try:
            plan = plan_licence(terms, None, f"me/style-{terms.naming or 'x'}".replace(" ", "-"))
        except BadInput as refusal:
            assert not terms.publishable and "does not allow" in refusal.what
        else:
            assert plan.identifier and (plan.identifier != "other" or (plan.name and plan.link)), name
