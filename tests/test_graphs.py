"""Graphs of a model: programs of torch.export and ONNX files give what the model gives."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import done, refused
from pico_hf import PicoModel
from pico_hf import export as exporting
from pico_hf.core.score_form import ScoreForm
from pico_hf.core.similarity import pooled_similarity, weighted_score
from pico_hf.core.token_features import TokenFeatures
from pico_hf.graphs import onnx_files
from pico_hf.graphs.modules import ImageGraph, TextGraph, attends_to_padding
from pico_hf.graphs.onnx_files import IMAGE_FILE, SCORES_FILE, TEXT_FILE, export_onnx, run_file
from pico_hf.graphs.programs import Programs, export_programs, plain_attention
from pico_hf.graphs.scores import late_interaction, score
from reference import similarity_loop
from test_import_order import imported
from tiny import every, tiny_encoder, tiny_inputs, tiny_processor
from tiny_encoders import BUILDERS, one_layer

FAST = ["clip", "siglip", "vit+bert"]
NO_GRAPH = ["siglip2"]  # resizes its position embeddings for every image
SLOW = [name for name in BUILDERS if name not in (*FAST, *NO_GRAPH)]
TOLERANCE = 1e-5
SHARES = (0.0, 1 / 3, 1.0)


def made(name: str) -> PicoModel:
    """A model with rotated columns of unlike weights; pooled vectors are a third of its score."""
    encoder = one_layer(tiny_encoder(name)) if name in FAST else tiny_encoder(name)
    model = PicoModel.from_encoder(encoder, num_prototypes=3, probe_size=3, pooled_share=0.0).eval()
    columns = model.column_weights.numel()
    bases = [torch.linalg.qr(torch.randn(columns, columns))[0] for _ in range(2)]
    model.prototypes.commit(ScoreForm(torch.linspace(0.0, 1.0, columns), 1 / 3, *bases))
    model.pair_logits.logit_scale.data.fill_(2.0)
    return model


def batches(model: PicoModel, name: str) -> list[tuple[dict, dict]]:
    """Inputs of both graphs: other batches and lengths than the example's, padded left too."""
    found = []
    for batch, words, left in ((5, 8, False), (5, 8, True), (1, 1, False)):
        inputs = tiny_inputs(batch, words, encoder=name)
        images = {"pixel_values": inputs.pop("pixel_values")}
        if attends_to_padding(model):
            del inputs["attention_mask"]
        elif left:
            inputs = {key: value.flip(1) for key, value in inputs.items()}
        found.append((images, inputs))
    return found


@torch.no_grad()
def assert_same(model: PicoModel, name: str, image, text) -> None:
    """Two functions from inputs to the graphs' outputs give what the model and its score give."""
    for images, texts in batches(model, name):
        patches, words = model.encode_images(**images), model.encode_texts(**texts)
        got = image(images), text(texts)
        for (tokens, mask, pooled), side in zip(got, (patches, words), strict=True):
            assert mask.dtype == torch.bool
            assert torch.equal(mask, side.mask)
            weights = 1.0 if side is patches else model.column_weights
            real = (tokens - side.features * weights)[mask]
            assert float(real.abs().max()) <= TOLERANCE
            scaled = side.pooled * model.column_weights.sqrt()
            scaled = scaled / scaled.norm(dim=1, keepdim=True)
            torch.testing.assert_close(pooled, scaled, rtol=0, atol=TOLERANCE)
        arrays = [[part.numpy() for part in side] for side in got]
        for share in SHARES:
            scores = torch.from_numpy(score(*arrays, share))
            model.prototypes.share_score(share)
            expected = model.score(patches, words)
            torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)


def slow(names: list[str]) -> list:
    return every(names, pytest.mark.slow)


# The fast ones of others are checked where ONNX files are made of them.
@pytest.mark.parametrize("name", [FAST[0], *slow(FAST[1:])])
def test_programs_give_what_the_model_gives(name):
    model = made(name).train()
    programs = export_programs(model)
    assert model.training
    assert_programs_are_same(model.eval(), name, programs)


def assert_programs_are_same(model: PicoModel, name: str, programs: Programs) -> None:
    image, text = (program.module() for program in programs)
    assert_same(model, name, lambda x: image(**x), lambda x: text(**x))


def assert_files_are_same(model: PicoModel, name: str, target: Path) -> None:
    image, text = target / IMAGE_FILE, target / TEXT_FILE
    assert_same(model, name, lambda x: run_file(image, x), lambda x: run_file(text, x))


@pytest.fixture(scope="module")
def commanded(tmp_path_factory) -> tuple[PicoModel, Path, str]:
    """A model, what the command has written of it, and what it has said."""
    needs_onnx()
    folder = tmp_path_factory.mktemp("command")
    model = made("clip")
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    said = done("export", "--format", "onnx", folder / "model", folder / "out")
    return model, folder / "out", said


def test_the_files_of_the_command_give_what_the_model_gives(commanded):
    model, folder, _ = commanded
    assert_files_are_same(model, "clip", folder)


def test_the_command_writes_graphs_processor_and_score_and_no_more(commanded):
    from transformers import AutoProcessor

    _, folder, said = commanded
    assert said.startswith("Graphs of images and of texts with the column weights folded in, and")
    processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    written = {path.name for path in folder.iterdir()}
    assert written == {IMAGE_FILE, TEXT_FILE, SCORES_FILE} | processor
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "out"]
    AutoProcessor.from_pretrained(folder)


def test_the_score_beside_the_graphs_needs_numpy_alone(commanded):
    tree = ast.parse((commanded[1] / SCORES_FILE).read_text(encoding="utf-8"))
    roots = {name.split(".")[0] for name in imported(tree)}
    assert roots - sys.stdlib_module_names == {"numpy"}


def test_a_file_holds_one_side_no_local_path_and_what_makes_logits(commanded):
    import onnx

    _, folder, _ = commanded
    for name, other in ((IMAGE_FILE, "text_model"), (TEXT_FILE, "vision_model")):
        graph = onnx.load(folder / name)
        onnx.checker.check_model(graph)
        assert not [tensor.name for tensor in graph.graph.initializer if other in tensor.name]
        raw = (folder / name).read_bytes()
        assert b"site-packages" not in raw
        assert str(Path(onnx_files.__file__).parent).encode() not in raw
        about = {entry.key: float(entry.value) for entry in graph.metadata_props}
        expected = {"scale": np.exp(2.0), "bias": 0.0, "pooled_share": 1 / 3}
        assert about == pytest.approx(expected)
        axes = [dim.dim_param for dim in graph.graph.input[0].type.tensor_type.shape.dim]
        assert axes[:2] == (["batch", ""] if name == IMAGE_FILE else ["batch", "length"])


@pytest.mark.parametrize(
    "name",
    [*FAST[1:], *slow(SLOW)],
)
def test_onnx_files_and_their_programs_give_what_the_model_gives(name, tmp_path, monkeypatch):
    needs_onnx()
    model, made_of = made(name), []
    monkeypatch.setattr(
        onnx_files, "export_programs", lambda m: made_of.append(export_programs(m)) or made_of[0]
    )
    export_onnx(model, tmp_path / "onnx")
    assert_programs_are_same(model, name, made_of[0])
    assert_files_are_same(model, name, tmp_path / "onnx")


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def test_tokens_of_images_are_indexed_once_for_any_weights_their_pooled_vectors_are_not():
    model, images = made("clip"), batches(made("clip"), "clip")[0]
    graphs = ImageGraph(model), TextGraph(model)
    with torch.no_grad():
        before = [graph(**side) for graph, side in zip(graphs, images, strict=True)]
        model.prototypes.semantic_probability.fill_(1.0)
        image, text = ImageGraph(model)(**images[0]), TextGraph(model)(**images[1])
    assert torch.equal(image[0], before[0][0])
    assert not torch.equal(text[0], before[1][0])
    for side, old in ((image, before[0]), (text, before[1])):  # a length depends on the weights
        assert not torch.allclose(side[2], old[2], atol=1e-3)


@torch.no_grad()
def test_a_calibrated_model_has_a_calibrated_graph():
    model, (images, _) = made("clip"), batches(made("clip"), "clip")[0]
    plain = model.encode_images(**images).features
    model.calibrate([{"pixel_values": images["pixel_values"] + 2}], [images])
    program = export_programs(model).image.module()
    expected = model.encode_images(**images).features
    torch.testing.assert_close(program(**images)[0], expected, rtol=0, atol=TOLERANCE)
    assert float((plain - expected).abs().max()) > 0.01


def test_attention_is_what_it_was_after_an_export():
    model = made("clip")
    kinds = [config._attn_implementation for config in configs(model)]
    assert set(kinds) == {"sdpa"}
    with plain_attention(model):
        assert {config._attn_implementation for config in configs(model)} == {"eager"}
    assert [config._attn_implementation for config in configs(model)] == kinds


def configs(model):
    return [
        model.encoder.config,
        model.encoder.text_model.config,
        model.encoder.vision_model.config,
    ]


@pytest.mark.parametrize(
    ("output", "change"),
    [
        (0, lambda tokens: tokens + 0.1),
        (0, lambda tokens: tokens * torch.nan),
        (1, lambda mask: ~mask),
        (2, lambda pooled: pooled.roll(1, dims=1)),
        (2, lambda pooled: pooled * torch.nan),
    ],
)
def test_a_graph_that_differs_from_the_model_is_not_written(output, change, tmp_path, monkeypatch):
    needs_onnx()
    model = made("clip")

    def run_wrongly(path, inputs):
        graph = (ImageGraph if path.name == IMAGE_FILE else TextGraph)(model)
        with torch.no_grad():
            outputs = [output.clone() for output in graph(**inputs)]
        outputs[output] = change(outputs[output])
        return outputs

    monkeypatch.setattr(onnx_files, "export_programs", lambda _: Programs(None, None))
    monkeypatch.setattr(onnx_files, "_write", lambda _, path, *__: path.write_bytes(b""))
    monkeypatch.setattr(onnx_files, "run_file", run_wrongly)
    with pytest.raises(ValueError, match="gives other features in onnxruntime than the model"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_without_a_graph_are_refused(tmp_path):
    model = PicoModel.from_encoder(
        tiny_encoder("siglip2"), num_prototypes=3, probe_size=3, pooled_share=0.0
    )
    with pytest.raises(ValueError, match="resizes its position embeddings for every image"):
        export_programs(model)
    needs_onnx()
    with pytest.raises(ValueError, match=r"must be in float32, got torch\.bfloat16"):
        export_onnx(made("clip").to(torch.bfloat16), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ---- the score in numpy ------------------------------------------------------------------------


def test_the_score_in_numpy_is_the_loops(monkeypatch):
    from pico_hf.graphs import scores

    generator = torch.Generator().manual_seed(0)
    images = TokenFeatures(
        torch.randn(4, 6, 5, generator=generator), torch.rand(4, 6, generator=generator) > 0.4
    )
    texts = TokenFeatures(
        torch.randn(3, 7, 5, generator=generator), torch.rand(3, 7, generator=generator) > 0.4
    )
    sides = [part.numpy() for side in (images, texts) for part in (side.features, side.mask)]
    expected = similarity_loop(images, texts).numpy()
    for products in (2**24, 30):
        monkeypatch.setattr(scores, "BLOCK_PRODUCTS", products)
        np.testing.assert_allclose(late_interaction(*sides), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: np.ones((1, 3, 4), np.float32)}, r"as wide as `image_tokens` \(2 columns\), got 4"),
        ({1: np.ones((1, 2), np.int64)}, "`image_mask` must be boolean, got int64"),
        ({3: np.ones((1, 2), bool)}, r"`text_mask` of \(n, tokens\), got \(1, 3, 2\) and \(1, 2\)"),
        ({3: np.zeros((1, 3), bool)}, r"`text_mask` must have a real token .* rows \[0\]"),
    ],
)
def test_what_has_no_score_in_numpy_is_refused(change, message):
    sides = [np.ones((1, 2, 2)), np.ones((1, 2), bool), np.ones((1, 3, 2)), np.ones((1, 3), bool)]
    for place, value in change.items():
        sides[place] = value
    with pytest.raises(ValueError, match=message):
        late_interaction(*sides)


def test_the_score_in_numpy_is_the_models_for_any_share_of_pooled_vectors():
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    images, texts = (
        TokenFeatures(
            unit(torch.randn(rows, 6, 5, generator=generator), dim=-1),
            torch.ones(rows, 6, dtype=torch.bool),
            unit(torch.randn(rows, 5, generator=generator), dim=-1),
        )
        for rows in (4, 3)
    )
    weights = torch.tensor([0.2, 0.8, 1.0, 1.2, 1.8])
    columns = ((1.0, images), (weights, texts))
    sides = [
        [
            (side.features * scale).numpy(),
            side.mask.numpy(),
            unit(side.pooled * weights.sqrt(), dim=-1).numpy(),
        ]
        for scale, side in columns
    ]
    for share in SHARES:
        expected = weighted_score(images, texts, weights, share)
        found = score(*sides, share)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    cosines = pooled_similarity(images, texts, weights).numpy()
    assert np.abs(score(*sides, 0.0) - cosines).max() > 0.1


@pytest.mark.parametrize(
    ("share", "width", "message"),
    [
        (1.5, 2, r"`pooled_share` must be in \[0, 1\], got 1\.5"),
        (float("nan"), 2, "`pooled_share` must be in"),
        (0.5, 3, r"`texts` must hold pooled vectors .* got \(1, 3\) after \(1, 2, 2\)"),
    ],
)
def test_a_share_or_pooled_vectors_that_do_not_fit_are_refused(share, width, message):
    tokens, mask = np.ones((1, 2, 2)), np.ones((1, 2), bool)
    images, texts = [tokens, mask, np.ones((1, 2))], [tokens, mask, np.ones((1, width))]
    with pytest.raises(ValueError, match=message):
        score(images, texts, share)


# ---- the command -------------------------------------------------------------------------------


def test_bad_input_of_the_command_leaves_nothing(tmp_path, monkeypatch):
    made("clip").save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    command = ["export", "--format", "onnx", source, str(tmp_path / "out")]
    assert "`target` must not be the folder of the source" in refused(*command[:-1], source)
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: name)
    assert "`--fold` is for the plain encoder" in refused(*command, "--fold")
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnx" else name)
    assert "ONNX files need onnx. Install the extra" in refused(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["encoder", "onnx"])
def test_an_export_that_fails_half_way_leaves_nothing(kind, tmp_path, monkeypatch):
    def fail(_, folder):
        assert list(Path(folder).iterdir())
        raise OSError("the disk is full")

    made("clip").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(onnx_files, "check_installed", lambda: None)
    monkeypatch.setattr(
        onnx_files, "export_onnx", lambda _, folder: (folder / "image.onnx").touch()
    )
    monkeypatch.setattr(exporting, "export_processor", fail)
    command = ["export", "--format", kind, str(tmp_path / "model"), str(tmp_path / "out")]
    assert "the disk is full" in refused(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_that_is_there_is_filled(tmp_path, monkeypatch):
    made("clip").save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    done("export", tmp_path / "model", ".")
    assert Path("model.safetensors").is_file()  # seen from a shell that stands there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
