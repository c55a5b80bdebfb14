"""What is promised for every family of models: one contract, tiny random weights, a real processor each."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from family_templates import TOKENS
from family_zoo import FAMILIES, Family, build_family
from peft import LoraConfig, PeftModel
from PIL import Image

from mllm_cl.data.collate import IGNORED, Collator, image_token_ids, image_tokens, plain_text
from mllm_cl.data.rows import Rows, assistant_message, user_message
from mllm_cl.errors import DataError, ModelError
from mllm_cl.evaluation.engine import GenerationSettings, generate, token_counts
from mllm_cl.methods import METHODS, Method, build_method
from mllm_cl.methods._prompts import Prompts
from mllm_cl.methods.inquiry_regularization import InquiryRegularization
from mllm_cl.methods.progressive_prompts import ProgressivePrompts
from mllm_cl.methods.replay import Replay
from mllm_cl.methods.spectral_consolidation import SpectralConsolidation
from mllm_cl.methods.task_adapters import TaskAdapters
from mllm_cl.models import adapters, parts
from mllm_cl.models.load import base_fingerprint
from mllm_cl.models.soft_prompts import SoftPrompts
from mllm_cl.recipe import MethodSpec
from mllm_cl.streams import Stream, Task
from mllm_cl.training.learner import Learner

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


@dataclass
class Instance:
    """A family, its model as built, and the processor."""

    family: Family
    model: Any
    processor: Any
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = base_fingerprint(self.model)

    def row(self, name: str, question: str, answer: str, images: int = 1, wide: bool = False) -> dict[str, Any]:
        count = images if self.family.images else 0
        colour = COLOURS.get(answer.split()[0], (9, 99, 9))
        pictures = [Image.new("RGB", (56 if wide and index == 0 else 28, 28), colour) for index in range(count)]
        return {
            "id": name,
            "messages": [user_message(question, count), assistant_message(answer)],
            "images": pictures,
            "answers": [answer],
        }

    def mixed(self) -> list[dict[str, Any]]:
        """Rows of every kind that the family takes."""
        rows = [self.row("one", "What is this?", "red"), self.row("wide", "Is this red? Answer.", "no blue", wide=True)]
        if self.family.several:
            rows.append(self.row("two", "What are these?", "a photo of a cat", images=2))
        if self.family.text_only_rows:
            rows.append(self.row("none", "Is blue a colour?", "yes it is", images=0))
        return rows

    def stream(self, rows: int = 8) -> Stream:
        def task(name: str, question: str) -> Task:
            made = [
                self.row(
                    f"{name}/{i}", question + "!" * (i % 3), ["red", "blue"][i % 2], int(i != 5 or not self.optional)
                )
                for i in range(rows)
            ]
            return Task(name, Rows(made), Rows(made[:4]))

        return Stream("small", (task("colours", "What is this?"), task("names", "Name it.")), fingerprint="small")

    @property
    def optional(self) -> bool:
        return self.family.text_only_rows


@pytest.fixture(scope="module")
def instances(tmp_path_factory):
    """Builds every family once."""
    made: dict[str, Instance] = {}

    def get(name: str) -> Instance:
        if name not in made:
            model, processor = build_family(name, tmp_path_factory.mktemp("family"))
            made[name] = Instance(FAMILIES[name], model, processor)
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def instance(request, instances) -> Instance:
    return instances(request.param)


def shown(inputs: dict[str, Any], row: int) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


# collation ---------------------------------------------------------------------------------------------------------------


def test_labels_are_the_assistants_tokens(instance):
    rows = instance.mixed()
    inputs = Collator(instance.processor)(rows)
    tokenizer = instance.processor.tokenizer
    end = TOKENS[instance.family.template][1]
    for index, row in enumerate(rows):
        labels = inputs["labels"][index]
        learnt = labels[labels != IGNORED].tolist()
        said = tokenizer.decode(learnt).replace("<think>\n\n</think>", "").replace("<|END_RESPONSE|>", "")
        assert said.strip() == row["answers"][0] + end
        where = (labels != IGNORED).nonzero().flatten().tolist()
        assert where == list(range(where[0], where[0] + len(where)))
        assert torch.equal(labels[where], inputs["input_ids"][index, where])
    assert (inputs["labels"][inputs["attention_mask"] == 0] == IGNORED).all()


def test_placeholders_are_what_images_expand_to(instance):
    rows, processor = instance.mixed(), instance.processor
    inputs = Collator(processor)(rows)
    if not instance.family.images:
        assert set(inputs) == {"input_ids", "attention_mask", "labels"}
        return
    image = processor.tokenizer.convert_tokens_to_ids(instance.family.image)
    assert image in image_token_ids(processor)
    for index, row in enumerate(rows):
        alone = Collator(processor)([row])
        assert shown(inputs, index) == shown(alone, 0)
        count = int((alone["input_ids"] == image).sum())
        assert (count > 0) == bool(row["images"])
        between = sum(image_tokens(processor, picture.size) for picture in row["images"])
        assert count <= between <= 4 * max(count, 1)  # some families frame their image tokens with further ones
    assert any("pixel_values" in name for name in inputs)


def test_a_batch_says_what_its_rows_say(instance):
    """Logits of a row do not depend on the rows beside it."""
    rows = instance.mixed()
    together = Collator(instance.processor)(rows)
    with torch.no_grad():
        logits = instance.model(**together).logits
        for index, row in enumerate(rows):
            alone = instance.model(**Collator(instance.processor)([row])).logits[0]
            assert torch.allclose(logits[index, : len(alone)], alone, atol=2e-5), row["id"]


def test_rows_that_a_family_does_not_take_are_named(instance):
    row = instance.row("odd/1", "What is this?", "red", images=0)
    if not instance.family.images:
        picture = Image.new("RGB", (28, 28))
        row = {**row, "messages": [user_message("?", 1), assistant_message("x")], "images": [picture]}
        with pytest.raises(DataError, match="row odd/1: has an image, but this model reads text only"):
            Collator(instance.processor)([row])
    elif not instance.family.text_only_rows:
        with pytest.raises(DataError, match=r"odd/1.*without an image"):
            Collator(instance.processor)([row])
    else:
        assert "pixel_values" not in Collator(instance.processor)([row])


def test_lengths_are_known_without_pixels(instance):
    counts = token_counts(instance.processor, instance.mixed())
    assert len(counts) == len(instance.mixed())
    assert all(count > 0 for count in counts)


# the parts of the model --------------------------------------------------------------------------------------------------


def test_adapters_are_on_the_language_part_alone(instance):
    model = instance.model
    decoder, vision = parts.decoder_name(model), parts.vision_name(model)
    hit = [name for name, _ in model.named_modules() if re.fullmatch(parts.lora_targets(model), name)]
    assert hit
    assert all(name.startswith(f"{decoder}.") for name in hit)
    assert (vision is not None) == instance.family.images
    if vision is None:
        with pytest.raises(ModelError, match="no vision tower"):
            parts.lora_targets(model, vision=True)
        return
    assert not vision.startswith(f"{decoder}.")
    bridge = parts.bridge_names(model)
    assert bridge
    if not any(parts.linear_names(model, part) for part in bridge):
        with pytest.raises(ModelError, match="has no linear layer"):
            parts.lora_targets(model, bridge=True)
        return
    both = parts.lora_targets(model, bridge=True, vision=True)
    added = {name for name, _ in model.named_modules() if re.fullmatch(both, name)} - set(hit)
    assert any(any(name.startswith(part) for part in bridge) for name in added)
    assert any(name.startswith(vision) for name in added)


# training ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def llava_c(instance, tmp_path) -> Callable[[], list[Method]]:
    """SAC + UIR; a model that reads text only is asked about text only."""
    options: dict[str, Any] = {}
    if not instance.family.images:
        pool = tmp_path / "pool.txt"
        pool.write_text("What is a cat?\nIs blue a colour?\nWhat is red?\n", encoding="utf-8")
        options = {"modality": "text", "pool": str(pool)}
    return lambda: [SpectralConsolidation(), InquiryRegularization(ratio=0.5, **options)]


CASES: dict[str, Callable[[], list[Method]]] = {
    "replay": lambda: [Replay(size=4, share=0.5)],
    "task_adapters": lambda: [TaskAdapters(samples=4)],
}


def learner_of(instance: Instance, methods: list[Method]) -> Learner:
    return Learner(copy.deepcopy(instance.model), instance.processor, methods, LoraConfig(r=2, lora_alpha=4))


def weights_of(learner: Learner) -> dict[str, dict[str, torch.Tensor]]:
    return {name: adapters.adapter_state(learner.model, name) for name in adapters.adapter_names(learner.model)}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def moved(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values()) and any(
        bool(value.any()) for name, value in state.items() if "lora_B" in name
    )


SETTINGS = {"per_device_train_batch_size": 4, "num_train_epochs": 1}


def test_two_tasks_with_llava_c(instance, llava_c, train_task, tmp_path):
    """Trained, saved, continued from disk to the same bytes, read by plain PEFT, answered in any batch; base untouched."""
    learner, stream = learner_of(instance, llava_c()), instance.stream()
    for stage in (1, 2):
        train_task(learner, stream, **SETTINGS)
        learner.save_adapters(tmp_path / str(stage) / "adapter")
        learner.save_states(tmp_path / str(stage) / "method")
    end = weights_of(learner)[adapters.DEFAULT]
    assert moved(end)
    assert base_fingerprint(learner.model) == instance.fingerprint

    again = learner_of(instance, llava_c())
    again.load_stage(tmp_path / "1" / "adapter", tmp_path / "1" / "method", 1)
    train_task(again, stream, **SETTINGS)
    assert same(weights_of(again)[adapters.DEFAULT], end)

    plain = PeftModel.from_pretrained(copy.deepcopy(instance.model), str(tmp_path / "2" / "adapter")).eval()
    inputs = Collator(instance.processor)(instance.mixed())
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, learner.model.eval()(**inputs).logits)

    rows = instance.mixed() + list(stream[0].test)
    answers = [
        generate(learner.model, instance.processor, rows, GenerationSettings(4, size)) for size in (1, 3, "auto")
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("case", ["replay", "task_adapters"])
def test_two_tasks_with(case, instance, train_task):
    learner, stream = learner_of(instance, CASES[case]()), instance.stream()
    for _ in stream:
        train_task(learner, stream, **SETTINGS)
    for name, state in weights_of(learner).items():
        assert moved(state) or (case == "task_adapters" and name == adapters.DEFAULT)
    assert base_fingerprint(learner.model) == instance.fingerprint
    route = learner.router(learner.context(stream[1], stream, None), None)
    answers = [
        generate(learner.model, instance.processor, list(stream[0].test), GenerationSettings(3, n), route)
        for n in (1, 4)
    ]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_soft_prompts_are_words_that_have_no_token(instance):
    """A prompt made of the embeddings of words answers like the words themselves, in one pass and in generation."""
    learner, stream = learner_of(instance, [ProgressivePrompts(length=3)]), instance.stream()
    learner.begin_task(stream[0], stream, Accelerator(cpu=True))
    model, processor = learner.model.eval(), instance.processor
    inputs = Collator(processor, for_generation=True)(list(stream[0].test[:1]))
    words = processor.tokenizer("red no", add_special_tokens=False, return_tensors="pt")["input_ids"]
    vectors = model.get_base_model().get_input_embeddings()(words)
    soft, ids = SoftPrompts.of(model), inputs["input_ids"]
    soft.choose = lambda inputs: vectors
    refused = [name for name, value in inputs.items() if value.shape[:2] == ids.shape and value.dim() > 2]
    if refused:
        with pytest.raises(ModelError, match=refused[0]):
            model(**inputs)
        return
    start = int(ids[0, 0] == processor.tokenizer.bos_token_id)
    written = dict(inputs)
    for name, value in inputs.items():
        if value.shape == ids.shape:
            middle = {"input_ids": words, "attention_mask": torch.ones_like(words)}.get(name, torch.zeros_like(words))
            written[name] = torch.cat([value[:, :start], middle.to(value.dtype), value[:, start:]], dim=1)
    logits = model(**inputs).logits
    with soft.paused():
        plain = model(**written).logits
        tokens = model.generate(**written, max_new_tokens=4, do_sample=False)[:, written["input_ids"].shape[1] :]
    keep = [place for place in range(plain.shape[1]) if not start <= place < start + words.shape[1]]
    assert torch.equal(logits, plain[:, keep])
    (answer,) = generate(model, processor, list(stream[0].test[:1]), GenerationSettings(4, 1))
    assert answer == plain_text(processor.batch_decode(tokens, skip_special_tokens=True)[0])


OPTIONS = {
    "ewc": {"samples": 4},
    "lora_null": {"samples": 4},
    "corda": {"samples": 4},
    "inquiry_regularization": {"ratio": 0.5},
    "task_adapters": {"samples": 4},
    "moelora": {"experts": 2},
    "mr_lora": {"shots": 2, "epochs": 1},
    "clmoe": {"experts": 2, "samples": 4},
    "smolora": {"blocks": 1},
    "branchlora": {"experts": 2, "samples": 4},
    "l2p": {"pool": 2, "top": 1},
}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("replay", "task_adapters")])
def test_every_method_learns_where_positions_have_three_axes(method, instances, train_task):
    """Every method on the family that differs most from the model of the contract tests."""
    instance = instances("Qwen3-VL")
    learner = learner_of(instance, [build_method(MethodSpec(name=method, options=OPTIONS.get(method, {})))])
    stream = instance.stream(rows=4)
    for _ in stream:
        train_task(learner, stream, **SETTINGS)
    assert base_fingerprint(learner.model) == instance.fingerprint
    if not isinstance(learner.methods[0], Prompts):  # they leave the adapter as it is
        assert any(moved(state) for state in weights_of(learner).values())
    answers = [generate(learner.model, instance.processor, instance.mixed(), GenerationSettings(3, n)) for n in (1, 4)]
    assert answers[0] == answers[1]
