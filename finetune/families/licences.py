"""Terms that several families share."""

from __future__ import annotations

from finetune.families.protocol import LicenceTerms

APACHE = LicenceTerms(identifier="apache-2.0", name="Apache-2.0", link="https://www.apache.org/licenses/LICENSE-2.0")


def tencent(link: str, year: int, territory: str) -> LicenceTerms:
    """The Tencent Hunyuan Community License. year: of the copyright line that section 3(d) prescribes for the Notice file.

    territory: places where there is no licence at all, neither for the base nor for an adapter made from it.
    """
    return LicenceTerms(
        identifier="other", name="tencent-hunyuan-community", link=link, territory=territory,
        notice=f"Tencent Hunyuan is licensed under the Tencent Hunyuan Community License Agreement, Copyright © {year} Tencent. "
               "All Rights Reserved. The trademark rights of “Tencent Hunyuan” are owned by Tencent or its affiliate.")
