"""States behind many prompts are those of each text and prompt read whole."""

import pytest
import torch

from benchmarks.real import states as module
from benchmarks.real.states import cached_states, states_behind
from tests.conftest import KINDS
from tests.tiny import text_model

ROWS = [[5, 6, 7], [8, 9], [9, 8, 7], [10]]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "opt-350m"])
def test_each_state_is_that_of_the_whole_text(kind):
    torch.manual_seed(0)
    llm = text_model(kind, 40)
    table = llm.get_input_embeddings().weight.detach()
    prompts = {"a": table[[11, 12, 13]], "b": table[[14]], "mean row": table.mean(0, keepdim=True)}
    states = states_behind(llm, ROWS, prompts, layers=(-2,))
    for i, row in enumerate(ROWS):
        for name, prompt in prompts.items():
            with torch.no_grad():
                whole = llm.base_model(inputs_embeds=torch.cat([table[row], prompt])[None], output_hidden_states=True)
            hidden = whole.last_hidden_state[0, len(row) :]
            assert torch.allclose(states[name]["last"][i], hidden[-1], atol=1e-5), (name, i)
            assert torch.allclose(states[name]["before"][i], hidden[max(-2, -len(prompt))], atol=1e-5)
            assert torch.allclose(states[name]["mean"][i], hidden.mean(0), atol=1e-5)
            assert torch.allclose(states[name]["layer -2"][i], whole.hidden_states[-2][0, -1], atol=1e-5)


def test_they_are_kept_and_resumed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    llm = text_model("llama", 40)
    prompts = {"a": llm.get_input_embeddings().weight.detach()[[11, 12]]}
    monkeypatch.setattr(module, "PART_ROWS", 2)
    whole, calls = module.states_behind, []

    def counting(llm, rows, *rest):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(llm, rows, *rest)

    monkeypatch.setattr(module, "states_behind", counting)
    with pytest.raises(KeyboardInterrupt):
        cached_states(llm, ROWS, prompts, tmp_path / "cache")
    states = cached_states(llm, ROWS, prompts, tmp_path / "cache")
    assert calls == [2, 2, 2]  # the first part was there
    assert torch.allclose(states["a"]["last"], whole(llm, ROWS, prompts)["a"]["last"], atol=1e-6)
    with pytest.raises(ValueError, match="prompts"):
        cached_states(llm, ROWS, {"a": prompts["a"] + 1}, tmp_path / "cache")
