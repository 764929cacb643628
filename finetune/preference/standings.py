"""Who comes first: pictures within a prompt, and the adapters that drew them over all prompts."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.preference.bradley_terry import Standing, rank_items, rank_players
from finetune.preference.candidate_folder import Candidate, CandidateFolder
from finetune.preference.comparisons import Judgement
from finetune.preference.pairs import preference_pairs


def picture_standings(folder: CandidateFolder, judgements: Sequence[Judgement]) -> dict[str, list[Standing]]:
    """prompt id -> its pictures from strongest to weakest; prompts without a comparison are left out."""
    pairs = preference_pairs(judgements, ties=True)
    compared = {pair.prompt_id for pair in pairs}
    return {
        prompt_id: rank_items([candidate.id for candidate in group], [pair for pair in pairs if pair.prompt_id == prompt_id])
        for prompt_id, group in folder.by_prompt().items() if prompt_id in compared
    }


def adapter_standings(folder: CandidateFolder, judgements: Sequence[Judgement]) -> list[Standing]:
    """What drew the pictures (base, or adapters with their weights) from strongest to weakest."""
    player_of = {candidate.id: drawn_by(candidate) for candidate in folder.candidates().values()}
    return rank_players(preference_pairs(judgements, ties=True), player_of)


def drawn_by(candidate: Candidate) -> str:
    """A name for what drew this picture: its adapters with weights, else its base or the data set it came from."""
    if candidate.adapters:
        return " + ".join(f"{adapter['name']}:{adapter['weight']:g}" for adapter in candidate.adapters)
    return candidate.base or candidate.source or "unknown"
