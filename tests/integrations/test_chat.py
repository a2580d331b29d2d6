"""Chat templates of folders."""

import json
import shutil
from pathlib import Path

import pytest

from secateur.integrations.chat import chat_template
from tests.integrations.folders import make_folder

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools here') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]


@pytest.fixture(params=["config", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model's folder with a chat template, where older and where newer ones have it."""
    found = make_folder(tmp_path / "model", "llama")
    config = {"bos_token": "[END]", "tokenizer_class": "ImaginaryTokenizer"}
    if request.param == "config":
        config["chat_template"] = TEMPLATE
    else:
        (found / "chat_template.jinja").write_text(TEMPLATE)
    (found / "tokenizer_config.json").write_text(json.dumps(config))
    return found


def test_the_prompt_ends_where_the_answer_begins(folder: Path) -> None:
    template = chat_template(folder)
    assert template is not None
    assert template(CHAT) == "[END]<system>a<user>b<assistant>"


def test_what_a_template_refuses_is_one_line(folder: Path) -> None:
    template = chat_template(folder)
    assert template is not None
    with pytest.raises(ValueError, match="template does not take this chat: no tools here$"):
        template([{"role": "tool", "content": "x"}])


def test_a_folder_without_one(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    assert chat_template(folder) is None
    (folder / "tokenizer_config.json").write_text('{"bos_token": "[END]"}')
    assert chat_template(folder) is None


def test_a_damaged_one_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{folder} has a chat template that cannot be read: "):
        chat_template(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json cannot be read as JSON"):
        chat_template(folder)


def test_no_code_of_the_folder_runs(folder: Path, tmp_path: Path) -> None:
    """Neither of a class that the config names, nor what a template can reach."""
    marker = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(config))
    template = chat_template(folder)
    assert template is not None and template(CHAT).endswith("<assistant>")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    escaping = chat_template(other)
    assert escaping is not None
    with pytest.raises(ValueError, match="does not take this chat"):
        escaping(CHAT)
    assert not marker.exists()
