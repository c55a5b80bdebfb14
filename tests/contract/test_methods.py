"""What every method must keep, whatever it does: one matrix of behaviours over all of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from method_options import SMALL
from peft import PeftModel
from transformers import TrainerCallback

from mllm_cl.data.collate import COMPANIONS, Collator
from mllm_cl.data.rows import Rows
from mllm_cl.evaluation import shared_prefix
from mllm_cl.evaluation.engine import GenerationSettings, generate, generate_batches
from mllm_cl.evaluation.likelihood import Ranker
from mllm_cl.methods import METHODS, Method, build_method, method_class
from mllm_cl.methods._experts import Experts
from mllm_cl.methods._inquiries import PRESETS
from mllm_cl.methods._prompts import Prompts
from mllm_cl.methods.base import overrides
from mllm_cl.methods.ewc import EWC
from mllm_cl.methods.finetune import Finetune
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.joint import Joint
from mllm_cl.methods.lwf import LwF
from mllm_cl.methods.replay import Replay
from mllm_cl.methods.single import Single
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.methods.task_adapters import TaskAdapters
from mllm_cl.models import adapters
from mllm_cl.recipe import MethodSpec
from mllm_cl.streams import Stream, Task


def uir(preset: str, **options: Any) -> InquiryRegularization:
    return InquiryRegularization(preset=preset, ratio=0.3, weight=1.0, **options)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "finetune": (lambda: [Finetune()], {}),
    "finetune-stacked": (lambda: [Finetune()], {"policy": "stacked"}),
    "joint": (lambda: [Joint()], {}),
    "single": (lambda: [Single()], {}),
    "replay-reservoir": (lambda: [Replay(size=5, share=0.25)], {}),
    "replay-balanced": (lambda: [Replay(size=5, share=0.25, policy="balanced")], {}),
    **{
        f"replay-{policy}": (lambda policy=policy: [Replay(size=5, policy=policy)], {})
        for policy in ("class_balanced", "herding", "surprise")
    },
    "lwf": (lambda: [LwF()], {}),
    "lwf-top-k": (lambda: [LwF(top_k=8)], {}),
    "lwf-stacked": (lambda: [LwF()], {"policy": "stacked"}),
    "ewc": (lambda: [EWC(samples=6)], {}),
    "sac": (lambda: [SpectralConsolidation()], {}),
    **{preset: (lambda preset=preset: [uir(preset)], {}) for preset in PRESETS},
    "llava-c": (lambda: [SpectralConsolidation(), uir("uir_memory")], {}),
    "adapters-prototype": (lambda: [TaskAdapters(samples=6)], {}),
    "adapters-oracle": (lambda: [TaskAdapters(router="oracle")], {}),
    "adapters-ridge": (lambda: [TaskAdapters(router="ridge", samples=6)], {}),
    "adapters-generative": (lambda: [TaskAdapters(router="generative", samples=6)], {}),
}
COVERED = {"spectral_consolidation", "inquiry_regularization", "task_adapters", "replay", "lwf", "ewc"}


def built(name: str) -> list[Method]:
    return [build_method(MethodSpec(name=name, options=SMALL.get(name, {})))]


CASES |= {name: (lambda name=name: built(name), {}) for name in METHODS if name not in COVERED | CASES.keys()}
STACKED = ("finetune-stacked", "lwf-stacked", "sac", "llava-c")
PER_TASK = tuple(case for case, (make, _) in CASES.items() if any(m.adapters == "per_task" for m in make()))
PROMPTED = tuple(case for case, (make, _) in CASES.items() if any(isinstance(m, Prompts) for m in make()))
INSTEAD = tuple(case for case, (make, _) in CASES.items() if any("training" in m.roles for m in make()))  # of adapters
GATED = tuple(case for case, (make, _) in CASES.items() if any(isinstance(m, Experts) for m in make())) + PROMPTED
STEPPING = tuple(  # what acts in a training step; accumulation cannot touch the others
    case
    for case, (make, _) in CASES.items()
    if case == "finetune"
    or any(overrides(m, hook) for m in make() for hook in ("parameters", "loss_terms", "before_step", "after_step"))
)
TERMS = {"lwf": "lwf", "lwf-top-k": "lwf", "lwf-stacked": "lwf", "llava-c": "uir"} | dict.fromkeys(PRESETS, "uir")
TERMS |= {name: name for name in ("ewc", "online_ewc", "si", "mas", "reglora")}
LATER: dict[str, tuple[str, ...]] = {"derpp": ("derpp_logits", "derpp_answers"), "o_lora": ("o_lora",)}
ALWAYS: dict[str, tuple[str, ...]] = {"n_lora": ("n_lora",), "clora": ("clora",), "token_weights": ("token_weights",)}
ALWAYS |= {name: (name,) for name in ("l2p", "modal_prompt")}


class Spy(Method):
    """Looks at the model in the middle of training and just before the stage is folded."""

    name = "spy"
    summary = "looks"

    def __init__(self) -> None:
        self.trainable: list[set[str]] = []
        self.updates: list[dict[str, torch.Tensor]] = []
        self.companions: list[float] = []  # per row of each task

    def train_rows(self, ctx, rows):
        attached = sum(len(some) for row in rows for some in row.get(COMPANIONS, {}).values())
        self.companions.append(attached / len(rows) if len(rows) else 0.0)
        return rows

    def loss_terms(self, ctx, model, batch, outputs):
        self.trainable.append(self.names(ctx))
        for kind in ("base", "previous"):
            policy_has_it = kind == "base" or adapters.PREVIOUS in adapters.adapter_names(ctx.model)
            if policy_has_it:
                with ctx.reference(kind):
                    self.trainable.append(self.names(ctx))
                    ctx.model(**{k: v for k, v in batch.inputs.items() if k != "labels"})
                self.trainable.append(self.names(ctx))
        assert ctx.model.training
        return {}

    def end_task(self, ctx) -> None:
        if adapters.TASK in adapters.adapter_names(ctx.model):
            deltas = adapters.adapter_deltas(ctx.model, adapters.TASK)
            self.updates.append({name: delta.dense() for name, delta in deltas.items()})

    @staticmethod
    def names(ctx) -> set[str]:
        """Trained adapter weights; what methods train beside them is theirs (tests/models/test_extra_parameters.py)."""
        return {n for n, p in ctx.model.named_parameters() if p.requires_grad and not n.startswith("method_parameters")}


@dataclass
class Story:
    """Two tasks learnt with one method, and what was seen on the way."""

    learner: Any
    stream: Stream
    spy: Spy
    base: dict[str, torch.Tensor]
    histories: list[list[dict[str, Any]]] = field(default_factory=list)
    stages: list[dict[str, dict[str, torch.Tensor]]] = field(default_factory=list)
    folder: Any = None


def base_weights(model) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def all_adapters(model) -> dict[str, dict[str, torch.Tensor]]:
    return {name: adapters.adapter_state(model, name) for name in adapters.adapter_names(model)}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def epochs(case: str, stage: int) -> int:
    """Long enough for the first task that is trained to be learnt."""
    return 3 if stage == 1 or case == "joint" else 1


_STORIES: dict[str, Story] = {}


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture
def story(case, make_learner, small_stream, train_task, tmp_path_factory) -> Story:
    """Told once per method, with the states of stage 1 on disk."""
    if case not in _STORIES:
        methods, settings = CASES[case]
        spy = Spy()
        learner, stream = make_learner(*methods(), spy, **settings), small_stream(2)
        rows = repr([list(task.train) for task in stream])
        told = Story(learner, stream, spy, base_weights(learner.model), folder=tmp_path_factory.mktemp(case))
        for stage in (1, 2):
            trainer = train_task(learner, stream, num_train_epochs=epochs(case, stage))
            told.histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
            told.stages.append(all_adapters(learner.model))
            learner.save_adapters(told.folder / str(stage) / "adapter")
            learner.save_states(told.folder / str(stage) / "method")
        assert repr([list(task.train) for task in stream]) == rows  # methods leave the rows as they are
        _STORIES[case] = told
    return _STORIES[case]


def learnt_loss(entry: dict[str, Any]) -> float:
    return entry["loss"] - sum(value for name, value in entry.items() if name.startswith("cl/"))


def test_the_first_task_that_is_trained_is_learnt(case, story):
    history = story.histories[1 if case == "joint" else 0]
    part = case in ("attention_only", "gate_up_only", "bottom_frozen", "smolora")  # half of the matrices or of the rank
    share = 0.97 if case in PROMPTED else 0.9 if part else 0.8  # random weights have little that a prompt calls up
    assert learnt_loss(history[-1]) < share * learnt_loss(history[0])


def test_the_second_task_is_trained(story):
    history = story.histories[1]
    assert history
    assert all(entry["loss"] == entry["loss"] for entry in history)
    assert story.learner.stage == 2


def test_terms_start_where_the_reference_is(case, story):
    term = f"cl/{TERMS.get(case)}"
    first, second = story.histories
    if case in LATER:  # only from the second task on, and not zero where it starts
        assert not any(name.startswith("cl/") for entry in first for name in entry)
        assert all(any(f"cl/{name}" in entry for entry in second) for name in LATER[case])
    elif case in ALWAYS:
        assert all(f"cl/{name}" in entry for entry in first + second for name in ALWAYS[case])
    elif case not in TERMS:
        assert not any(name.startswith("cl/") for entry in first + second for name in entry)
    elif TERMS[case] == "uir":
        assert abs(first[0][term]) < 1e-5
        assert any(entry.get(term, 0) > 1e-6 for entry in first)
    else:
        assert not any(term in entry for entry in first)
        assert abs(second[0][term]) < 1e-5
        assert any(entry.get(term, 0) > 0 for entry in second[1:])


def test_memory_is_estimated_with_as_many_companions_as_there_are(story):
    said = [sum(method.companions_per_row(earlier) for method in story.learner.methods) for earlier in (0, 1)]
    assert story.spy.companions == pytest.approx(said, abs=0.03)  # whole rows


def test_the_base_is_never_written(story):
    assert same(base_weights(story.learner.model), story.base)


def test_only_the_tasks_own_adapter_is_trainable(case, story):
    assert story.spy.trainable
    for names in story.spy.trainable:
        if case in INSTEAD:
            assert not names
            continue
        owners = {name.split(".lora_")[1].split(".")[1] for name in names}
        branches = {"default"} if case == "shared_specific" else set()  # its shared branch learns the first task too
        assert len(owners - branches) == 1
        assert owners <= {"default", "task", "of-colours", "of-yes+no"}
        assert ("task" in owners) == (story.learner.policy == "stacked")
    assert not any(parameter.requires_grad for parameter in story.learner.model.parameters())


def mixed_rows(stream: Stream) -> list[Any]:
    return [row for pair in zip(stream[0].test, stream[1].test) for row in pair]


@pytest.mark.parametrize("case", ["finetune", "finetune-stacked", *PER_TASK, *GATED])  # the others answer like one
def test_answers_do_not_depend_on_the_batch(case, story):
    rows, learner = mixed_rows(story.stream), story.learner
    for task in (story.stream[0].name, None):
        route = learner.router(learner.context(story.stream[1], story.stream, None), task)
        answers = [
            generate(learner.model, learner.processor, rows, GenerationSettings(3, size), route)
            for size in (1, 5, "auto")
        ]
        assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("case", [*PER_TASK, *GATED])
def test_choices_by_likelihood_do_not_depend_on_the_batch(case, story):
    """Candidates of several tokens pass row by row, whatever rows were routed together."""
    learner, rows = story.learner, [{**row, "choices": ["a red one", "it is blue"]} for row in mixed_rows(story.stream)]
    route = learner.router(learner.context(story.stream[1], story.stream, None), None)
    found: list[dict[int, str]] = []
    for size in (1, 5):
        batches = [list(range(len(rows)))[start : start + size] for start in range(0, len(rows), size)]
        given = (learner.model, learner.processor, rows, batches, GenerationSettings(3, size), route, Ranker.over(rows))
        found.append({place: text for batch, texts in generate_batches(*given) for place, text in zip(batch, texts)})
    assert found[0] == found[1]


@pytest.mark.parametrize("case", GATED)
def test_gated_adapters_from_disk_answer_questions_on_one_image(case, story, make_learner, tmp_path, monkeypatch):
    """The gates come into the model with the first batch that is routed, and such rows share no keys and values."""
    monkeypatch.setattr(shared_prefix, "_WORTH", 2.0)
    rows = mixed_rows(story.stream)[:6]
    for row in rows:
        row["images"][0].save(tmp_path / f"{row['images'][0].getpixel((0, 0))}.png")
    rows = [{**row, "images": [str(tmp_path / f"{row['images'][0].getpixel((0, 0))}.png")]} for row in rows]
    assert len({row["images"][0] for row in rows}) == 2
    methods, settings = CASES[case]
    learner = make_learner(*methods(), **settings)
    learner.load_stage(story.folder / "2" / "adapter", story.folder / "2" / "method", 2)
    route = learner.router(learner.context(story.stream[1], story.stream, None), None)
    given = (learner.model, learner.processor)
    answers = generate(*given, rows, GenerationSettings(3, 6), route)
    assert answers == [generate(*given, [row], GenerationSettings(3, 1), route)[0] for row in rows]


def test_saved_adapters_load_in_plain_peft(case, story, fresh):
    if case in GATED:
        pytest.skip("loads, but without its gates: see the next test")
    learner = story.learner
    rows = mixed_rows(story.stream)[:4]
    inputs = Collator(learner.processor)(rows)
    inputs.pop("labels")
    folders = ["."] if case not in PER_TASK else [task.name for task in story.stream]
    for folder in folders:
        names = [adapters.DEFAULT if folder == "." else adapters.task_adapter(folder)]
        plain = PeftModel.from_pretrained(fresh()[0], str(story.folder / "2" / "adapter" / folder)).eval()
        with torch.no_grad(), adapters.active(learner.model, names):
            assert torch.equal(plain(**inputs).logits, learner.model.eval()(**inputs).logits)


@pytest.mark.parametrize("case", GATED)
def test_gated_adapters_answer_from_disk_as_they_did(case, story, make_learner):
    """In a new process: the adapter's folder, the method's state, and `route` before the rows are answered."""
    methods, settings = CASES[case]
    rows, results = mixed_rows(story.stream)[:5], []
    again = make_learner(*methods(), **settings)
    again.load_stage(story.folder / "2" / "adapter", story.folder / "2" / "method", 2)
    for learner in (story.learner, again):
        inputs = Collator(learner.processor, for_generation=True)(rows)
        route = learner.router(learner.context(story.stream[1], story.stream, None), None)
        assert route(rows) is None
        with torch.no_grad():
            results.append(learner.model.eval()(**inputs).logits)
            with adapters.active(learner.model, []):
                results.append(learner.model(**inputs).logits)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])  # the untouched base
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("case", PER_TASK)
def test_past_tasks_are_isolated(story):
    first, second = story.stages
    name = adapters.task_adapter("colours")
    assert same(first[name], second[name])
    files = [(story.folder / stage / "adapter" / "colours" / "adapter_model.safetensors") for stage in "12"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stage_continues_from_disk_bit_for_bit(case, story, make_learner, train_task):
    methods, settings = CASES[case]
    learner = make_learner(*methods(), Spy(), **settings)
    learner.load_stage(story.folder / "1" / "adapter", story.folder / "1" / "method", 1)
    train_task(learner, story.stream, num_train_epochs=epochs(case, 2))
    again, before = all_adapters(learner.model), story.stages[1]
    kept = [name for name in again if name != adapters.PREVIOUS and (case not in PER_TASK or name != adapters.DEFAULT)]
    assert kept
    for name in kept:
        assert same(again[name], before[name])
    for one, two in zip(learner.methods, story.learner.methods):
        state, expected = one.state_dict(), two.state_dict()
        assert same(state.tensors, expected.tensors)
        assert state.data == expected.data


@pytest.mark.parametrize("case", STACKED)
def test_merging_is_exact_when_there_is_room(case, make_learner, small_stream, train_task):
    methods, settings = CASES[case]
    learner = make_learner(*methods(), spy := Spy(), max_rank=64, **settings)
    for _ in range(2):
        train_task(learner, small_stream(2, rows=8))
        assert learner.truncation_error == 0
    merged = adapters.adapter_deltas(learner.model, adapters.DEFAULT)
    for name, delta in merged.items():
        expected = spy.updates[0][name] + spy.updates[1][name]
        assert torch.allclose(delta.dense(), expected, atol=1e-6 * float(expected.abs().max()) + 1e-9)


def test_merging_without_room_reports_its_error(make_learner, small_stream, train_task):
    learner = make_learner(Finetune(), spy := Spy(), policy="stacked", max_rank=4)
    for _ in range(2):
        train_task(learner, small_stream(2, rows=8))
    errors = []
    for name, delta in adapters.adapter_deltas(learner.model, adapters.DEFAULT).items():
        exact = spy.updates[0][name] + spy.updates[1][name]
        errors.append(float((delta.dense() - exact).norm() / exact.norm()))
    assert max(errors) > 1e-3
    assert learner.truncation_error == pytest.approx(max(errors), rel=1e-3)


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())


@pytest.fixture
def uneven_stream(make_row) -> Stream:
    """Rows of different lengths, some without images, in numbers that no batch size divides."""

    def task(name: str, count: int) -> Task:
        rows = [
            make_row(f"{name}/{i}", f"{name}? " * (1 + i % 4), "red " * (1 + i % 3), None if i % 5 == 0 else (i, 9, 9))
            for i in range(count)
        ]
        return Task(name, Rows(rows), Rows(rows[:4]))

    return Stream("uneven", (task("one", 16), task("two", 19)))


@pytest.mark.parametrize("case", STEPPING)
def test_gradients_do_not_depend_on_accumulation(case, make_learner, uneven_stream, train_task):
    methods, settings = CASES[case]
    results = []
    for rows, accumulation in ((16, 1), (8, 2), (4, 4)) if case in TERMS else ((16, 1), (4, 4)):
        learner = make_learner(*methods(), **settings)
        common = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
        train_task(learner, uneven_stream, per_device_train_batch_size=16, **common)
        gradients = Gradients()
        train_task(
            learner,
            uneven_stream,
            gradients,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation,
            **common,
        )
        results.append(gradients.steps)
    assert len(results[0]) >= 2  # at the first step most regularisers are still at their minimum
    for other in results[1:]:
        assert len(other) == len(results[0])
        for expected, gradient in zip(results[0], other):
            assert expected.norm() > 0
            assert float((gradient - expected).norm() / expected.norm()) < 1e-5


def trained(make_learner, train_task, stream, *methods, **settings) -> dict[str, dict[str, torch.Tensor]]:
    learner = make_learner(*methods, **settings)
    for _ in stream:
        train_task(learner, stream)
    return all_adapters(learner.model)


# what strength 0 means to these is another thing than plain fine-tuning: nothing of a task is kept, or prompts are trained
NOT_A_PENALTY = {"model_mix", "spectral_consolidation", "l2p", "modal_prompt"}
WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    **{
        name: SMALL.get(name, {}) | {"strength": 0.0}
        for name in METHODS
        if "strength" in inspect.signature(method_class(name).__init__).parameters and name not in NOT_A_PENALTY
    },
    "derpp": {"alpha": 0.0, "beta": 0.0},
    "inquiry_regularization": {"weight": 0.0},
    "token_weights": {"alpha": 0.0},
}


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        (name, policy)
        for name in WITHOUT_EFFECT
        for policy in ("one", "stacked")
        if method_class(name).adapters in (None, policy)
    ],
)
def test_strength_zero_is_plain_fine_tuning_bit_for_bit(name, policy, make_learner, small_stream, train_task):
    torch.manual_seed(0)
    stream = small_stream(2, rows=16)
    plain = trained(make_learner, train_task, stream, Finetune(), policy=policy)
    torch.manual_seed(1)  # nothing may hang on the global generator
    method = build_method(MethodSpec(name=name, options=WITHOUT_EFFECT[name]))
    result = trained(make_learner, train_task, stream, method, policy=policy)
    assert same(result["default"], plain["default"])


def test_uniform_consolidation_at_full_strength_is_stacked_fine_tuning(make_learner, small_stream, train_task):
    stream, learners = small_stream(2, rows=16), []
    for method in (Finetune(), SpectralConsolidation(rate="uniform", strength=1.0)):
        learners.append(make_learner(method, policy="stacked"))
        for _ in stream:
            train_task(learners[-1], stream)
    plain, scaled = (adapters.adapter_deltas(learner.model, "default") for learner in learners)
    for name, delta in plain.items():
        assert torch.allclose(scaled[name].dense(), delta.dense(), atol=1e-6)
