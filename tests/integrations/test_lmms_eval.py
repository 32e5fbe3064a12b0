"""lmms-eval itself on a local task: the trained stand-in answers questions about its scenes. No network."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import flowcut_kernels as fk

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mini_vlm

if importlib.util.find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; `make test` installs it", allow_module_level=True)

from pages import commands_of

PAGE = "docs/lmms_eval.md"
TEMPLATE = """{% for message in messages %}{% for part in message.content -%}
{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"""
CODE = """
def images(document):
    return [document["image"]]

def right(document, answers):
    return {"right": float(answers[0] == document["answer"])}
"""
TASK = """
task: scenes
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.images
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
process_results: !function scenes.right
generation_kwargs: {{max_new_tokens: 3}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def asked() -> list:
    return mini_vlm.questions("dev", 15, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The stand-in with a chat template."""
    path = tmp_path_factory.mktemp("lmms") / "model"
    shutil.copytree(mini_vlm.WEIGHTS, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def alone(asked: list, policy: fk.FlowCut | None, **settings) -> list[str]:
    """Answers of the stand-in, question by question."""
    model, processor = mini_vlm.load()
    if policy is not None:
        fk.patch(model, policy)
    found = []
    for question in asked:
        inputs = processor(images=question.image, text=question.prompt, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False, **settings)
        found += processor.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return found


@pytest.mark.parametrize("command", [words for words in map(shlex.split, commands_of(PAGE)) if words[0] == "lmms-eval"])
def test_command(command, asked, folder, tmp_path):
    """What the page says, with a model and a task of this machine: of what is given twice the last counts.

    The pruned model is found in two processes that share an odd number of questions.
    """
    import datasets

    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    rows = [dict(image=q.image, question=q.prompt.removeprefix("<image> "), answer=q.answer) for q in asked]
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows, features)).save_to_disk(tmp_path / "data")
    (tmp_path / "scenes.py").write_text(CODE)
    (tmp_path / "scenes.yaml").write_text(TASK.format(data=tmp_path / "data"))
    given = command[command.index("--model_args") + 1]
    fields = dict(pair.split("=") for pair in given.split(","))
    name = fields.pop("policy")
    del fields["pretrained"]
    policy = None if name == "none" else getattr(fk, name)(**{key: int(value) for key, value in fields.items()})

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if policy else []
    arguments = f"{given},pretrained={folder},dtype=float32"
    here = ["--model_args", arguments, "--tasks", "scenes", "--include_path", tmp_path]
    variables = dict(os.environ, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", ACCELERATE_USE_CPU="1")
    variables |= dict(OMP_NUM_THREADS="1", HF_HOME=str(tmp_path / "home"))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *launch, "-m", "lmms_eval", *command[1:], *here],
            cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        # Once in many runs a thread of the process group outlives the program that the evaluator ends.
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(tmp_path.glob("logs/*/*_results.json")).read_text())
    lines = next(tmp_path.glob("logs/*/*_samples_scenes.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    expected = alone(asked, policy)
    assert [sample["filtered_resps"] for sample in samples] == expected
    share = sum(answer == q.answer for answer, q in zip(expected, asked, strict=True)) / len(asked)
    assert results["results"]["scenes"]["right,none"] == pytest.approx(share) and share > 0.7
    assert results["throughput"].get("avg_kept_encoder") == (policy and policy.target_tokens)
    assert results["config"]["model_args"] == arguments  # whoever reads the results sees the policy


def requests(documents: list[dict], settings: list[dict]) -> list:
    """As lmms-eval makes them for chat models."""
    from lmms_eval.api.instance import Instance

    def messages(document):
        media = [dict(type=kind, url=document[kind]) for kind in ("image", "audio") if kind in document]
        return [dict(role="user", content=[*media, dict(type="text", text=document["text"])])]

    made = partial(Instance, "generate_until", metadata=dict(task="scenes", doc_id=0, repeats=1))
    return [made(("", messages, s, i, "scenes", "test"), i) for i, s in enumerate(settings)]


def wrapped(folder: Path, documents: list[dict], **given):
    from flowcut_kernels.integrations.lmms_eval import PatchedModel

    model = PatchedModel(str(folder), dtype="float32", device="cpu", **given)
    model.task_dict["scenes"] = dict(test=documents)
    return model


def test_batches_of_unlike_requests(asked, folder, tmp_path):
    """Settings and media differ from request to request: every answer stands where its question did."""
    from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics, summarize_logged_metrics

    policy = fk.FlowCut(target_tokens=19, llm_layer=1)
    policy.to_json(tmp_path / "policy.json")
    blind = dict(text="how many digits")  # before any image, and among images
    documents = [blind, *(dict(image=q.image, text=q.prompt.removeprefix("<image> ")) for q in asked), blind]
    greedy, beams = dict(max_new_tokens=3, until=["\n\n"]), dict(max_new_tokens=3, num_beams=2, temperature=0)
    settings = [dict(max_new_tokens=1), *((greedy, beams)[place % 2] for place in range(len(asked))), beams]
    model = wrapped(folder, documents, policy_json=str(tmp_path / "policy.json"), batch_size="3")
    assert model.policy == policy
    reset_logged_metrics()
    answers = model.generate_until(requests(documents, settings))
    found = [answer.text for answer in answers[1:-1]]
    assert found[::2] == alone(asked[::2], policy) and found[1::2] == alone(asked[1::2], policy, num_beams=2)
    assert answers[1].token_counts.output_tokens == 2  # one word and the end of the sequence
    kept = summarize_logged_metrics()
    assert kept["avg_kept_encoder"] == 38 and kept["avg_kept_llm"] == 19


def test_a_temperature_samples(folder):
    settings = wrapped(folder, [], policy="none")._settings(dict(temperature=0.7, top_p=0.9, max_new_tokens=16))
    assert settings["do_sample"] and settings["temperature"] == 0.7 and settings["top_p"] == 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "exactly one of policy"),
        (dict(policy="FlowCut", policy_json="p.json"), "exactly one of policy"),
        (dict(policy="Flowcut", target_tokens=64), "policy=Flowcut: Flowcut is no policy: use one of .*FlowCut, "),
        (dict(policy="FlowCut", target_token=64), "unknown argument target_token: policy=FlowCut takes target_tokens"),
        (dict(policy="none", target_tokens=64), "unknown argument target_tokens: policy=none takes no fields"),
        (dict(policy="FlowCut"), "exactly one of target_tokens and retain_ratio"),
        (dict(policy="FlowCut", target_tokens=64, batch_size="auto"), "batch_size=auto"),
    ],
)
def test_bad_arguments_load_nothing(given, message):
    from flowcut_kernels.integrations.lmms_eval import PatchedModel

    with pytest.raises(ValueError, match=message):
        PatchedModel("no/such/model", **given)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "this is no JSON"), ("[]", "None is no policy"), ('{"policy": "none"}', "none is no policy")],
)
def test_bad_files_load_nothing(text, message, tmp_path):
    from flowcut_kernels.integrations.lmms_eval import PatchedModel

    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=f"p.json: {message}"):
        PatchedModel("no/such/model", policy_json=str(tmp_path / "p.json"))


def test_sound_is_refused(folder):
    model = wrapped(folder, [dict(audio="a.wav", text="how many digits")], policy="UniformTokens", target_tokens=36)
    with pytest.raises(ValueError, match="sound"):
        model.generate_until(requests(model.task_dict["scenes"]["test"], [{}]))


def test_tasks_by_likelihood_are_refused(folder):
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        wrapped(folder, [], policy="none").loglikelihood([])
