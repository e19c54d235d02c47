"""Tokens, tokenizers and language models: the stream, the masks, dropout's key, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import ROOT, dataset, placed, plan_json, prepare, rows, scalerun, specs, take_steps, work

from scaling_exps import cli, config, data, models, plan, sources, train
from scaling_exps.data import corpora, store, tokens
from scaling_exps.train import checkpoint, measure

CPU = torch.device("cpu")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "mix", "potions")
GPT = ["model=gpt", "dataset.context=16", "dataset.test_size=40", "model.width=16", "recipe.samples=64"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One cache for this file's tests, away from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def prose(count: int, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, count)) + ".\n"


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "prose.txt"
    file.write_text(prose(4000))
    return str(file)


def token_stream(path: str, seed: int = 0, **changes: Any) -> data.TokenStream:
    one = data.stream(dataset("text", **{"context": 16, **changes}), path, seed, CPU)
    assert isinstance(one, data.TokenStream)
    return one


def corpus(name: str, path: Path | str | None, tokenizer: str = "bytes", vocab: int = 256) -> corpora.Tokens:
    """The tokens of a corpus of any size."""
    sizes = {"context": 2, "train_size": None, "test_size": None}
    group = dataset(name, tokenizer=tokenizer, tokenizer_revision=None, vocab=vocab, **sizes)
    return corpora.load(group, None if path is None else str(path))


# ---- the stream ----


@pytest.mark.parametrize("mask", [0.0, 0.25])
def test_samples_do_not_depend_on_the_batch(text: str, mask: float) -> None:
    """Inputs, targets and masks of the first 1,024 sequences, over epoch boundaries, however they are asked for."""
    one = token_stream(text, train_size=300, mask=mask)
    whole = one.batch(0, 1024)
    for batch in (2, 8, 64):
        parts = [one.batch(i, i + batch) for i in range(0, 1024, batch)]
        for kind in (0, 1):
            assert torch.equal(torch.cat([p[kind] for p in parts]), whole[kind])


def test_an_epoch_reads_every_sequence_once_from_an_offset_of_its_own(text: str) -> None:
    one = token_stream(text)
    raw = torch.from_numpy(np.asarray(one.tokens.train).astype(np.int64))
    offsets = []
    for epoch in range(3):
        sequence, first = one._slice(epoch * one.size, (epoch + 1) * one.size)
        assert torch.equal(sequence.sort().values, torch.arange(one.size))
        (offset,) = set((first - sequence * 16).tolist())
        assert 0 <= offset < 16
        offsets.append(offset)
        x, y = one.batch(epoch * one.size, epoch * one.size + 4)
        for i in range(4):
            assert torch.equal(x[i], raw[first[i] : first[i] + 16])
            assert torch.equal(y[i], raw[first[i] + 1 : first[i] + 17])  # the next token
    assert len(set(offsets)) > 1
    assert not torch.equal(one.indices(0, 50), token_stream(text, seed=1).indices(0, 50))


def test_masking_hides_the_same_number_everywhere_and_shows_80_10_10(text: str) -> None:
    one = token_stream(text, mask=0.25)
    x, y = one.batch(0, 4000)
    plain = token_stream(text).batch(0, 4000)[0]
    hidden = y != tokens.IGNORE
    assert (hidden.sum(1) == 4).all()  # so a mean over a micro-batch is a mean over its sequences
    assert torch.equal(x[~hidden], plain[~hidden]) and torch.equal(y[hidden], plain[hidden])
    n = int(hidden.sum())
    masked, kept = (x[hidden] == 256).double().mean(), (x[hidden] == y[hidden]).double().mean()
    five_sigma = 5 * math.sqrt(0.16 / n)
    assert abs(float(masked) - 0.8) < five_sigma and abs(float(kept) - 0.1) < five_sigma
    places = hidden.double().mean(0)
    assert (places - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_the_test_set_hides_the_same_tokens_in_every_run(text: str) -> None:
    a, b = token_stream(text, mask=0.25), token_stream(text, mask=0.25, seed=7)
    assert torch.equal(a.test_batch(0, 9)[0], b.test_batch(0, 9)[0])
    assert torch.equal(torch.cat([a.test_batch(i, i + 3)[1] for i in (0, 3, 6)]), b.test_batch(0, 9)[1])


# ---- corpora and tokenizers ----


def test_bytes_are_the_bytes(text: str) -> None:
    tokens = corpus("text", text)
    raw = Path(text).read_bytes()
    cut = len(raw) - len(raw) // corpora.TEST_SHARE
    assert bytes(tokens.train) == raw[:cut] + b"\0" and bytes(tokens.test) == raw[cut:] + b"\0"
    assert isinstance(tokens.train, np.memmap)
    assert tokens.bytes_per_token == (len(raw) - cut) / (len(raw) - cut + 1)


def test_a_trained_bpe_says_the_text_again_and_is_shorter(text: str) -> None:
    from tokenizers import Tokenizer

    tokens = corpus("text", text, "bpe", 400)
    (trained,) = (p for p in sources.cache().glob("text-*/tokenizer.json"))
    decoded = Tokenizer.from_file(str(trained)).decode(tokens.test.tolist())
    raw = Path(text).read_text()
    assert decoded == raw[len(raw) - len(raw) // corpora.TEST_SHARE :]
    assert tokens.bytes_per_token > 2 and int(tokens.train.max()) < 400


def test_parquet_parts_and_documents(tmp_path: Path) -> None:
    """As the hub keeps WikiText: train and validation files; test is the validation part, empty rows are nothing."""
    for part, seed in (("train", 1), ("validation", 2), ("test", 3)):
        table = pa.table({"text": ["", prose(50, seed), prose(60, seed + 10)]})
        pq.write_table(table, tmp_path / f"{part}-00000.parquet")
    tokens = corpus("wikitext103", tmp_path)
    expected = b"".join(prose(n, s).encode() + b"\0" for n, s in ((50, 2), (60, 12)))
    assert bytes(tokens.test) == expected
    assert bytes(tokens.train) == b"".join(prose(n, s).encode() + b"\0" for n, s in ((50, 1), (60, 11)))


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["train.txt", "test.txt"], ["train.txt"], ["test.txt"]),
        (["train-1.txt", "val.txt", "test.txt"], ["train-1.txt"], ["val.txt"]),
        (["train_1.txt", "validation2.txt"], ["train_1.txt"], ["validation2.txt"]),
        (["letters.txt", "plays.txt", "test.txt"], ["letters.txt", "plays.txt"], ["test.txt"]),
        (["train.txt", "validity.txt", "valley.txt", "testament.txt", "valid.txt"], ["train.txt"], ["valid.txt"]),
    ],
    ids=" ".join,
)
def test_the_names_of_files_say_the_part(names: list[str], train: list[str], test: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text(f"{name} is here")
    tokens = corpus("text", tmp_path)
    assert bytes(tokens.train) == b"".join(f"{n} is here".encode() + b"\0" for n in sorted(train))
    assert bytes(tokens.test) == b"".join(f"{n} is here".encode() + b"\0" for n in sorted(test))


def test_only_a_whole_word_in_a_file_s_name_makes_a_part(tmp_path: Path) -> None:
    """Of 100 texts three begin with the letters of a part: all are read (review, defect 15: 97 of them vanished)."""
    names = [f"{k:03d}.txt" for k in range(97)] + ["testament.txt", "validity.txt", "valley.txt"]
    for name in names:
        (tmp_path / name).write_text(f"[{name}]")
    tokens = corpus("text", tmp_path)
    together = (bytes(tokens.train) + bytes(tokens.test)).decode()
    assert all(f"[{name}]" in together for name in names) and 0 < bytes(tokens.test).count(b"\0") < 20


def test_documents_without_a_test_part_are_shared_out(tmp_path: Path) -> None:
    texts = [prose(20, i) for i in range(600)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "part-0.parquet")
    tokens = corpus("wikibooks", tmp_path)
    count = bytes(tokens.test).count(b"\0")
    assert 600 / 20 - 5 * math.sqrt(30) < count < 600 / 20 + 5 * math.sqrt(30)
    assert count + bytes(tokens.train).count(b"\0") == 600


def test_a_tokenizer_of_a_folder(text: str, tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([prose(1000)], vocab_size=320, special_tokens=["<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>")
    fast.save_pretrained(tmp_path / "own")
    tokens = corpus("text", text, str(tmp_path / "own"), len(fast))
    assert tokens.train[-1] == fast.eos_token_id
    raw = Path(text).read_text()
    assert fast.decode(tokens.test[:-1].tolist()) == raw[len(raw) - len(raw) // corpora.TEST_SHARE :]
    with pytest.raises(data.DataError, match=f"has {len(fast)} ids; use dataset.vocab={len(fast)}"):
        corpus("text", text, str(tmp_path / "own"), 300)


def test_another_tokenizer_under_the_same_name_makes_other_tokens(tmp_path: Path) -> None:
    """Of one size and at one place. Fails for a cache that knows a tokenizer by its name (review, defect 13)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = tmp_path / "text.txt"
    text.write_text("a b " * 400)
    identities = []
    for vocabulary in ({"a": 0, "b": 1, "[U]": 2}, {"a": 1, "b": 0, "[U]": 2}):
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[U]").save_pretrained(tmp_path / "own")
        tokens = corpus("text", text, str(tmp_path / "own"), 16)
        assert tokens.train[:4].tolist() == [vocabulary["a"], vocabulary["b"]] * 2
        identities.append(sources.fingerprint("text", str(text), str(tmp_path / "own"), None))
    assert identities[0] != identities[1]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(data.DataError, match="cannot read column `text`"):
        corpus("wikitext103", tmp_path)
    assert not list(sources.cache().glob(".wikitext103-*"))


def test_the_standard_library_is_embedded() -> None:
    tokens = corpus("stdlib", None)
    assert len(tokens.train) > 4_000_000 and 0.02 < len(tokens.test) / len(tokens.train) < 0.12
    assert b"\nimport os\n" in bytes(tokens.train[: 10**7])


# ---- networks ----


def network(*words: str) -> torch.nn.Module:
    (composed,) = config.compose([*words, "dataset.context=16", "model.width=16"])
    return models.build(composed.model, composed.dataset, 0)


def test_gpt_does_not_look_ahead_and_roberta_does() -> None:
    x = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, 10] = (x[0, 10] + 1) % 256
    for name, ahead in (("gpt", False), ("roberta", True)):
        net = network(f"model={name}").eval()
        with torch.no_grad():
            moved = (net(x) - net(other)).abs().amax(-1)[0] > 1e-7
        assert moved[10:].all()
        assert bool(moved[:10].all()) == ahead and bool(moved[:10].any()) == ahead, name


def test_published_sizes() -> None:
    """GPT-2: 124M; RoBERTa base: 125M (both with tied output weights; recalled, checked against the configs)."""
    with torch.device("meta"):
        for name, words, count in (
            ("gpt_small", ["dataset.context=1024"], 124_439_808),
            ("roberta_base", ["dataset.context=512"], 124_697_433),
        ):
            (spec,) = plan.plan(config.compose([f"model={name}", *words]))
            s = spec.science
            net = models.build(s.model, s.dataset, 0)
            have = sum(p.numel() for p in net.parameters())
            assert abs(have / count - 1) < 0.003, (name, have)


def test_initial_loss_is_that_of_a_guess(text: str) -> None:
    """Nothing is learned yet: the loss is the logarithm of the vocabulary. Fails for targets that are the inputs."""
    for name, mask in (("gpt", 0.0), ("roberta", 0.25)):
        (spec,) = plan.plan(
            config.compose([f"model={name}", "dataset=text", f"dataset.path={text}", "dataset.context=16",
                            f"dataset.mask={mask}", "logger=none"])
        )  # fmt: skip
        metrics = measure.evaluate(train.Trainer(spec))
        assert metrics["loss"] == pytest.approx(math.log(256), abs=0.15)
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
        assert ("bits_per_byte" in metrics) == (mask == 0)


@pytest.mark.slow
def test_a_run_learns_and_says_what_people_look_at(text: str, tmp_path: Path) -> None:
    done = scalerun(
        "model=gpt", "dataset=text", f"dataset.path={text}", "dataset.context=16", "recipe.samples=1024",
        "recipe.lr=3e-3", "logger=none", "measure.evaluations=2", "measure.noise_unit=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout and "perplexity" in done.stdout
    assert "Warning" not in done.stderr  # torch's, of attention under vmap, in the noise of single examples
    (result,) = (tmp_path / "runs").glob("*/result.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert metrics["test_loss"] < 3.0  # the letters' own frequencies; a guess is 5.5
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["test_loss"]))
    one = token_stream(text)
    assert metrics["bits_per_byte"] == pytest.approx(metrics["test_loss"] / math.log(2) / one.bytes_per_token)
    drawn = scalerun("report", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "perplexity" in drawn.stdout


@pytest.mark.slow
def test_dropout_is_of_seed_and_place(tmp_path: Path) -> None:
    """With dropout: one process and two take the same steps, and an interrupted run goes on to the same bits."""
    words = [*GPT, "model.dropout=0.3", "batch=16", "recipe.batch=16", "recipe.micro_batch=4", "checkpoint.minutes=60"]
    (spec,) = specs(*words)
    one, two = prepare(tmp_path / "one", spec), prepare(tmp_path / "two", placed(spec, 2))
    work(one)
    work(two, 2)
    a, b = ({r["step"]: r["loss"] for r in rows(d) if r["kind"] == "train"} for d in (one, two))
    assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-5) for k in a)

    def steps(trainer: train.Trainer, count: int) -> list[torch.Tensor]:
        take_steps(trainer, count)
        return [p.detach().clone() for p in trainer.net.parameters()]

    whole = train.Trainer(spec)
    drawn = []
    for start in (0, 4, 0):
        whole.seed_dropout("dropout", start)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])  # another place, another mask
    expected = steps(whole, 3)
    part, run_dir = train.Trainer(spec), prepare(tmp_path / "part", spec)
    steps(part, 1)
    with run_dir.writer(0) as writer:
        checkpoint.save(part, run_dir, writer)
    torch.rand(7)  # somebody else draws
    rest = train.Trainer(spec)
    checkpoint.restore(rest, run_dir)
    assert rest.step == 1 and all(torch.equal(p, q) for p, q in zip(steps(rest, 2), expected, strict=True))
    science = msgspec.structs.replace(spec.science, model=msgspec.structs.replace(spec.science.model, dropout=0.0))
    other = train.Trainer(msgspec.structs.replace(spec, science=science))
    assert not all(torch.equal(p, q) for p, q in zip(steps(other, 3), expected, strict=True))


def test_who_converts_a_corpus_second_takes_what_is_there(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "tokens"
    for _ in range(2):  # the second as if both had begun before either was done
        store.keep(folder, lambda aside: corpora._convert([Path(text)], "bytes", "", 256, aside))
    assert {p.name for p in folder.parent.iterdir()} == {"tokens"}
    assert {p.name for p in folder.iterdir()} == {"meta.json", "train.bin", "test.bin"}


def test_other_tokens_are_not_gone_on_with(text: str) -> None:
    (spec,) = specs("model=gpt", "dataset=text", f"dataset.path={text}", "dataset.context=16", "recipe.samples=64")
    train.Trainer(spec).train_step()
    Path(text).write_text(prose(5000, seed=9))
    with pytest.raises(data.DataError, match="is not what the run was planned with"):
        train.Trainer(spec)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=gpt", "dataset.context=128", "model.context=64"], "longer than the model's model.context=64"),
        (["model=gpt", "dataset.context=1"], "dataset.context=1 must be an integer in [2, "),
        (["model=gpt", "dataset.mask=0.15"], "use dataset.mask=0"),
        (["model=roberta", "dataset.mask=0"], "give dataset.mask"),
        (["model=roberta", "dataset.mask=1.5"], "dataset.mask=1.5 must be a number in [0, 1)"),
        (["model=roberta", "dataset.mask=0.001"], "hides no token"),
        (["model=gpt", "recipe.samples=null", "recipe.epochs=3"], "recipe.epochs needs dataset.train_size"),
        (["model=gpt", "dataset=stdlib", "recipe=digits-small"], "recipe.epochs needs dataset.train_size"),
        (["model=gpt", "dataset.tokeniser=bytes"], "did you mean 'dataset.tokenizer'"),
        (["model=gpt", "optimizer=sgd"], "no reference point for optimizer=sgd with model=gpt on dataset=stdlib"),
    ],
)
def test_bad_words_are_refused_by_the_plan(words: list[str], says: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (each kind of refusal is one)
        plan.plan(config.compose(words))
    assert says in str(refusal.value)


def test_what_cannot_run_is_refused_before_the_first_step(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCALERUN_DATA", str(tmp_path))
    own = ["dataset=text", f"dataset.path={text}"]
    for words, says in (
        (["model=gpt", "dataset=text"], "needs dataset.path"),
        (["model=gpt", "dataset=text", "dataset.path=nowhere.txt"], "does not exist"),
        (["model=gpt", *own, "dataset.tokenizer=some/hub", "dataset.vocab=50257"], "training never downloads"),
        (["model=gpt", *own, "dataset.vocab=100"], "use dataset.vocab=256"),
        (["model=gpt", *own, "dataset.tokenizer=bpe"], "too small for bpe"),
        (["model=gpt", *own, "dataset.context=60000"], "sequences of dataset.context=60000"),
        (["model=gpt", *own, "dataset.train_size=1000000"], "train tokens, which make"),
        (["model=gpt", *own, "model.heads=5"], "model.width=64 must be a multiple of model.heads=5"),
        (["model=gpt", *own, "model.dropout=1"], "model.dropout=1 must be a number in [0, 1)"),
        (["model=gpt_small", "dataset.tokenizer=bytes", "dataset.vocab=256"], "scalerun data wikitext103"),
        (["model=gpt", "dataset=digits", "recipe=digits-small"], "reads tokens, and dataset digits has images"),
        (["model=resnet8", "dataset=stdlib", "recipe=stdlib-small"], "reads images, and dataset stdlib has tokens"),
    ):  # fmt: skip
        assert cli.main([*words, "logger=none"]) == 2, words
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message, (words, message)
        assert not (tmp_path / "runs").exists()


def test_planning_language_needs_no_torch(tmp_path: Path) -> None:
    (planned,) = plan_json("model=gpt", "batch=32", cwd=tmp_path)
    assert planned["kappa"] == 16 and planned["scaled"]["steps"] == 512


# ---- every laptop experiment runs ----

SMALL = [
    *(f"fig1_small model={m} optimizer={o}" for m in ("vgg16", "resnet8", "resnet20") for o in ("adam", "rmsprop")),
    *(
        "fig1_ablations_small",
        "fig1_eps_small",
        "fig1_eps_small model=resnet8 optimizer=rmsprop",
        "epsilon_small",
        "beta1_small",
        "ramp_gpt_small",
        "ramp_resnet_small",
    ),
    *(
        "fig2_small model=timm",
        "fig2_small model=vit optimizer=adamw",
        "fig2_small model=gpt",
        "fig2_small model=roberta",
    ),
    *("fig3_small optimizer=adam", "fig3_small optimizer=rmsprop", "fig4_small", "fig5_small"),
    "fig4_small model.norm=batch recipe.micro_batch=16",
]


@pytest.mark.slow
@pytest.mark.parametrize("words", SMALL)
def test_every_small_experiment_takes_its_first_steps(
    words: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two steps at the largest batch of the file, one evaluation on a few examples, a record and a result."""
    given = f"experiment={words}".split()
    (composed,) = config.compose(given)
    if composed.dataset.name == "cifar10":
        request.getfixturevalue("cifar10")
    batches = composed.batch if isinstance(composed.batch, list) else [composed.batch or composed.recipe.batch]
    batch = max(b for b in batches if b is not None)
    (spec, *_) = plan.plan(
        config.compose(
            [
                *given, f"batch={batch}", "seed=0", "recipe.epochs=null", f"recipe.samples={2 * batch}",
                "measure.evaluations=1", "measure.train_records=2", "measure.noise=free", "dataset.test_size=64",
                "logger=none", "svag=1", "recipe.statistics_samples=64",
            ]
        )
    )  # fmt: skip
    run_dir = prepare(tmp_path, spec)
    assert train.run(run_dir) == "finished"
    result = json.loads((run_dir.path / "result.json").read_text())
    assert math.isfinite(result["metrics"]["test_loss"]) and len(rows(run_dir)) >= 3
    assert spec.margin or words.startswith(("fig3", "fig4", "fig5"))


def test_every_experiment_is_run_here_or_says_what_it_costs() -> None:
    """Fails if a laptop experiment were left out of the list above, or a file did not say what it is for."""
    run_here = {words.partition(" ")[0] for words in SMALL}
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        panels = sorted((path.parent / "panel").glob(f"{path.stem}-*.yaml"))
        head = "".join(p.read_text() for p in (path, *panels))
        assert "Command:" in head and re.search("Expected:|Cost and expected:", head), path
        assert f"experiment={path.stem}" in head or path.stem == "demo", path
        assert path.stem in run_here or not path.stem.endswith("_small"), path
        assert path.stem in run_here or "Cost" in head, path
    for words in ("model=roberta_base", "model=gpt_small"):
        (composed,) = config.compose(["experiment=fig2_language", words])
        assert composed.margin.perplexity == 0.5


assert os.environ["HF_HUB_OFFLINE"] == "1"  # conftest: nothing here may reach for the hub
