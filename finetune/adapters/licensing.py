"""Under which licence an adapter may be published, given the terms of its base. The terms are data of the family."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from finetune.errors import BadInput

# Licences that let a derived work choose its own; everything else passes its terms on.
PERMISSIVE = {"apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense", "isc"}
LICENCE_FILE, NOTICE_FILE = "LICENSE.txt", "Notice.txt"


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
    base_name: what the base's licence is called."""

    identifier: str
    name: str
    link: str
    notice: str = ""
    needs_copy: bool = False
    territory: str = ""
    base_name: str = ""


def plan_licence(terms: BaseTerms | None, wanted: str | None, repo: str) -> LicencePlan:
    """The licence to publish under. wanted: what the user asked for, or None for the base's own.

    Raises BadInput when the base allows no derived works, asks for another licence, or asks for a name that `repo` lacks;
    and when nothing is known of the base and no licence was named.
    """
    if wanted is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+\-]{0,60}", wanted):
        raise BadInput(f"{wanted!r} is not a licence identifier of the Hub", where="--licence", fix="such as apache-2.0, cc-by-4.0 or other")
    if terms is None:
        if wanted is None:
            raise BadInput("the base's licence is not known", where="--licence", fix="look it up on the base's page and name it with --licence")
        return LicencePlan(wanted, wanted, "")
    if not terms.publishable:
        raise BadInput(f"the base's licence ({terms.name}) does not allow publishing what was derived from it", where="--licence")
    if terms.identifier in PERMISSIVE:
        return LicencePlan(wanted or terms.identifier, wanted or terms.name, "" if wanted else terms.link, base_name=terms.name)
    if wanted is not None and wanted not in (terms.identifier, terms.name):
        raise BadInput(f"the base's licence ({terms.name}) must be passed on; {wanted} is not allowed", where="--licence", fix=f"leave --licence out, or give {terms.name}")
    if terms.naming and _letters(terms.naming) not in _letters(repo.rpartition("/")[2]):
        raise BadInput(f"the base's licence asks that the name contains {terms.naming!r}", where=repo, fix=f"publish as {repo}-{terms.naming.lower().replace(' ', '-')}")
    return LicencePlan(terms.identifier, terms.name, terms.link, terms.notice, bool(terms.notice), terms.territory, terms.name)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
