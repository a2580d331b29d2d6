"""The chat template of a folder, applied by transformers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from secateur.core.disk.data_files import read_json
from secateur.integrations.transformers import not_installed

# The messages of a chat, and the text that the model goes on with.
Template = Callable[[Sequence[Mapping[str, str]]], str]


def chat_template(folder: Path) -> Template | None:
    """What makes a prompt of the messages of a chat, each with its `role` and its `content`.

    It is None where the folder has no chat template. The template runs in the sandbox of
    transformers, and no code of the folder does. A chat that the template does not take, as when
    roles have to alternate, is a ValueError.

    Raises:
        ValueError: if there is a template and it cannot be read, or transformers is not installed.
    """
    config = folder / "tokenizer_config.json"
    known = read_json(config) if config.is_file() else {}
    own = (folder / "chat_template.jinja").is_file()
    if not own and not known.get("chat_template"):
        return None
    try:
        import transformers
    except ImportError as error:
        raise ValueError(not_installed("transformers")) from error
    # Not the class that the config names, which would read other files, too.
    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # transformers has no narrower one
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} has a chat template that cannot be read: {said}") from error

    def written(messages: Sequence[Mapping[str, str]]) -> str:
        given = [dict(message) for message in messages]
        try:
            return str(
                tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # whatever the template's own code raises
            said = " ".join(str(error).split())
            raise ValueError(
                f"the model's chat template does not take this chat: {said}"
            ) from error

    return written
