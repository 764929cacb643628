"""Under which licence an adapter may be published, given the terms of its base. The terms are data of the family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from finetune.errors import BadInput

# Licences that let a derived work choose its own; everything else passes its terms on.
PERMISSIVE = {"apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense", "isc"}
LICENCE_FILE, NOTICE_FILE = "LICENSE.txt", "Notice.txt"
# What the Hub calls a licence that it does not know by an identifier: its card then names one and links its text.
OTHER = "other"


class BaseTerms(Protocol):
    """What must be known of a base's licence (`families.protocol.LicenceTerms`)."""

    identifier: str
    name: str
    link: str
    publishable: bool
    notice: str
    naming: str
    territory: str


@dataclass(frozen=True)
class LicencePlan:
    """identifier, name, link: for the card.  notice: text of the file that must lie beside the weights, or "".
    needs_copy: the base's agreement must lie there too.  territory: where the base gives no licence, or "".
    base_name: what the base's licence is called.  own_text: the text of the adapter's own licence must lie beside the weights."""

    identifier: str
    name: str
    link: str
    notice: str = ""
    needs_copy: bool = False
    territory: str = ""
    base_name: str = ""
    own_text: bool = False


def plan_licence(terms: BaseTerms | None, wanted: str | None, repo: str, own_name: str | None = None) -> LicencePlan:
    """The licence to publish under. wanted: what the user asked for, or None for the base's own.  own_name: what "other" is
    called, where it is the adapter's own licence and not the base's.

    Raises BadInput for an "other" without a name, or a name without it; when the base allows no derived works, asks for another licence, or asks for a name that `repo` lacks;
    and when nothing is known of the base and no licence was named.
    """
    if wanted is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+\-]{0,60}", wanted):
        raise BadInput(f"{wanted!r} is not a licence identifier of the Hub", where="--licence", fix="such as apache-2.0, cc-by-4.0 or other")
    if terms is None:
        if wanted is None:
            raise BadInput("the base's licence is not known", where="--licence", fix="look it up on the base's page and name it with --licence")
        return _chosen(wanted, own_name, "")
    if not terms.publishable:
        raise BadInput(f"the base's licence ({terms.name}) does not allow publishing what was derived from it", where="--licence")
    if terms.identifier in PERMISSIVE:
        return _chosen(wanted, own_name, terms.name) if wanted else LicencePlan(terms.identifier, terms.name, terms.link, base_name=terms.name)
    if wanted is not None and wanted not in (terms.identifier, terms.name):
        raise BadInput(f"the base's licence ({terms.name}) must be passed on; {wanted} is not allowed", where="--licence", fix=f"leave --licence out, or give {terms.name}")
    if terms.naming and _letters(terms.naming) not in _letters(repo.rpartition("/")[2]):
        raise BadInput(f"the base's licence asks that the name contains {terms.naming!r}", where=repo, fix=f"publish as {repo}-{terms.naming.lower().replace(' ', '-')}")
    return LicencePlan(terms.identifier, terms.name, terms.link, terms.notice, bool(terms.notice), terms.territory, terms.name)


def _chosen(wanted: str, own_name: str | None, base_name: str) -> LicencePlan:
    """The licence that a user is free to choose."""
    if wanted != OTHER:
        return LicencePlan(wanted, wanted, "", base_name=base_name)
    if own_name is None or not re.fullmatch(r"[a-z0-9][a-z0-9.\-]{0,60}", own_name):
        what = "the licence has no name" if own_name is None else f"{own_name!r} is not a name that the Hub takes"
        raise BadInput(what, where="--licence-name", fix="name it in small letters, digits, - and ., such as my-licence-1.0, and give its text with --licence-file")
    return LicencePlan(OTHER, own_name, LICENCE_FILE, own_text=True, base_name=base_name)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
