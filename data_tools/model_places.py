"""Whether a model that somebody names is there at all, found out before anything is scanned or loaded for it."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import BadInput
from data_tools.near_names import meant_path

SECONDS = 10.0  # the longest wait for the one answer


def require_model(name: str, fix: str, *, file: str = "config.json", revision: str | None = None, where: str | None = None) -> None:
    """Raises BadInput where `name` is neither a place on this disk, nor in the Hub's local cache, nor on the Hub.

    file: what every such model has.  revision: of it on the Hub.  where: how the user named it, else `name`.  Asks the Hub once. What waiting may mend
    (a slow or busy Hub) passes, since whoever loads the model tries again.
    """
    where = where or name
    try:
        if Path(name).exists():
            return
    except (OSError, ValueError):
        pass
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        ask_once(name, file, revision)
    except HFValidationError:
        raise BadInput(f"there is no {name} here, and no model on the Hub can be called so", where=where, fix=meant_path(name, fix)) from None
    except GatedRepoError:
        raise BadInput("the model asks for its licence to be accepted first", where=where, fix=f"accept it at https://huggingface.co/{name} and log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise BadInput(f"there is no model called {name}, neither here nor on the Hub", where=where, fix=meant_path(name, fix)) from None
    except RevisionNotFoundError:
        raise BadInput(f"the model {name} has no revision {revision}", where=where, fix="give a branch, a tag or a commit that it has") from None
    except EntryNotFoundError:
        return
    except OSError as error:
        raise BadInput(f"there is no {name} here, and the Hub cannot be asked for it ({' '.join(str(error).split())[:100]})", where=where, fix=meant_path(name, fix)) from None


def ask_once(name: str, file: str, revision: str | None = None) -> None:
    """Ask the Hub for one file of a model that its local cache knows nothing of, without trying again.

    Raises what a second try would not mend: OSError where there is no connection, or none is allowed; RepositoryNotFoundError,
    GatedRepoError, RevisionNotFoundError and EntryNotFoundError of huggingface_hub; HFValidationError for what cannot be an id.
    """
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, FileMetadataError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)
    # A path; or a mark that the repository has been asked for the file before and does not hold it, which its loader knew to do without.
    if try_to_load_from_cache(name, file, revision=revision) is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        raise
    except httpx2.ConnectError as error:
        raise ConnectionError(str(error)) from None
    except (HfHubHTTPError, FileMetadataError, httpx2.HTTPError):
        return
