"""The real Hub client against a loopback server: nothing here leaves the machine.

The client reads its settings when it is imported, so every script runs in a process of its own; as
that costs seconds, a script asserts more than one thing.
"""

import re
from pathlib import Path

import pytest
from safetensors.torch import load

from hub_client import run_client
from hub_server import Entry, Hub

START = """
import os, sys
from pathlib import Path
import torch
from tiny import tiny_encoder, tiny_inputs, tiny_processor, tiny_refined
from pico_hf import PicoModel, PicoPrototypes

def refusal(action, error=OSError):
    try:
        action()
    except error as caught:
        message = str(caught)
        assert "\\n" not in message, message
        return message
    raise AssertionError("was not refused")

def scores(model):
    return model(**tiny_inputs()).logits_per_image

def assert_equal(one, other):
    assert torch.equal(scores(one), scores(other))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
"""


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script in a fresh process with an empty cache, unless `home` names a used one."""

    def start(script: str, *arguments: str, home: str = "home", start: str = START, **env: str):
        return run_client(hub, start + script, tmp_path, *arguments, home=home, **env)

    return start


def test_what_was_pushed_is_what_is_pulled_and_only_once(hub, run):
    run("""
from transformers import AutoModel
model = tiny_refined()
model.push_to_hub("org/pico-clip")
tiny_processor().push_to_hub("org/pico-clip")
for load in (PicoModel.from_pretrained, AutoModel.from_pretrained, PicoModel.from_pretrained):
    assert_equal(model, load("org/pico-clip"))
prototypes = PicoPrototypes.from_pretrained("org/pico-clip")
for name, value in model.prototypes.state_dict().items():
    assert torch.equal(value, prototypes.state_dict()[name]), name
""")
    files = hub.files("org/pico-clip")
    assert {"model.safetensors", "config.json", "prototypes.safetensors"} <= files.keys()
    assert {"prototypes.json", "README.md", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if name.endswith(".py")]
    assert hub.seen(r"PUT /lfs/.*/part/") > 2  # the weights went up in parts
    assert hub.seen(r"PUT /lfs/org/pico-clip/\w+$") == 1  # the prototypes in one piece
    assert hub.seen(r"GET /org/pico-clip/resolve/\w+/model.safetensors") == 1


@pytest.mark.slow
def test_revisions_tags_and_private_repositories(hub, run):
    run("""
from huggingface_hub import HfApi
api, first, second = HfApi(), tiny_refined(seed=0), tiny_refined(seed=1)
first.push_to_hub("org/secret", private=True)
api.create_tag("org/secret", tag="v1")
second.push_to_hub("org/secret", revision="next")
assert_equal(first, PicoModel.from_pretrained("org/secret"))
assert_equal(second, PicoModel.from_pretrained("org/secret", revision="next"))
second.push_to_hub("org/secret", commit_message="Another one")
assert_equal(second, PicoModel.from_pretrained("org/secret"))
assert_equal(first, PicoModel.from_pretrained("org/secret", revision="v1", token="reader"))
second.prototypes.push_to_hub("org/secret-protos", private=True)
commit = api.list_repo_commits("org/secret")[0].commit_id
assert_equal(second, PicoModel.from_pretrained("org/secret", revision=commit))
assert "`revision`" in refusal(lambda: PicoModel.from_pretrained("org/secret", revision="v9"))
refs = api.list_repo_refs("org/secret")
assert {b.name for b in refs.branches} == {"main", "next"} and refs.tags[0].name == "v1"
""")
    assert hub.repositories["org/secret"].private
    assert hub.repositories["org/secret-protos"].private
    assert hub.titles("org/secret")[-1] == "Another one"


@pytest.mark.slow
def test_prototypes_alone_serve_whoever_has_the_encoder(hub, run):
    run("""
model = tiny_refined()
model.encoder.push_to_hub("org/clip")
tiny_encoder(seed=1).push_to_hub("org/other-clip")
tiny_encoder("siglip").push_to_hub("org/siglip")
model.prototypes.push_to_hub("org/pico-protos", commit_message="Prototypes")
again = PicoModel.from_pretrained("org/clip", prototypes="org/pico-protos")
assert_equal(model.eval(), again)
assert (again.config.num_prototypes, again.config.probe_size) == (3, 3)
again.save_pretrained("again")
assert_equal(again, PicoModel.from_pretrained("again"))
for dtype in (torch.float16, torch.bfloat16):
    PicoModel.from_pretrained("org/clip", prototypes="org/pico-protos", dtype=dtype)
import copy, pickle
pickled = pickle.loads(pickle.dumps(model))
for twin in (copy.deepcopy(model), pickled):
    twin.save_pretrained("twin")
    assert PicoPrototypes.from_pretrained("twin").fingerprint == again.prototypes.fingerprint
def load(encoder):
    return lambda: PicoModel.from_pretrained(encoder, prototypes="org/pico-protos")
assert "16 columns, the encoder has 32" in refusal(load("org/siglip"), ValueError)
assert "fingerprint" in refusal(load("org/other-clip"), ValueError)
message = refusal(lambda: PicoModel.from_pretrained("org/clip", prototypes="org/clip"))
assert "'org/clip' has no prototypes.json" in message
message = refusal(lambda: PicoPrototypes(4, 2, 3).save_pretrained("orphan"), ValueError)
assert "place_beside" in message and not Path("orphan").exists()
""")
    files = hub.files("org/pico-protos")
    assert set(files) == {"prototypes.safetensors", "prototypes.json", "README.md"}
    assert b'"encoder_fingerprint"' in files["prototypes.json"]
    assert load(files["prototypes.safetensors"])["vision"].shape == (3, 3)


@pytest.mark.slow
def test_a_second_load_needs_no_network(hub, run):
    run("""
model = tiny_refined()
model.push_to_hub("org/pico-clip")
PicoModel.from_pretrained("org/pico-clip").save_pretrained("expected")
model.save_pretrained("local", max_shard_size="20KB")
from huggingface_hub import HfApi
HfApi().create_repo("org/sharded")
HfApi().upload_folder(repo_id="org/sharded", folder_path="local")
assert_equal(model, PicoModel.from_pretrained("org/sharded"))
PicoPrototypes.from_pretrained("org/sharded")
""")
    before = len(hub.requests)
    hub.close()
    run(
        """
expected = PicoModel.from_pretrained("expected")
assert_equal(expected, PicoModel.from_pretrained("org/pico-clip"))
assert_equal(expected, PicoModel.from_pretrained("org/sharded", prototypes="org/sharded"))
refusal(lambda: PicoModel.from_pretrained("org/never-loaded"))
refusal(lambda: PicoPrototypes.from_pretrained("org/pico-clip"))
""",
        HF_HUB_OFFLINE="1",
    )
    assert len(hub.requests) == before


@pytest.mark.slow
def test_an_upload_that_breaks_off_leaves_the_folder_whole_and_can_be_repeated(hub, run):
    hub.fail("PUT /lfs/org/broken", "drop")  # the client itself tries this again
    hub.fail("POST /api/models/org/broken/commit", "drop")
    run("""
model = tiny_refined()
def push():
    model.save_pretrained("folder", push_to_hub=True, repo_id="org/broken")
message = refusal(push, ConnectionError)
assert "'org/broken'" in message and "do it again" in message
assert_equal(model, PicoModel.from_pretrained("folder"))
PicoPrototypes.from_pretrained("folder")
refusal(lambda: PicoModel.from_pretrained("org/broken"))  # no half of it is to be seen
push()
assert_equal(model, PicoModel.from_pretrained("org/broken"))
""")
    assert hub.titles("org/broken") == ["initial commit", "Upload model"]
    assert "prototypes.json" in hub.files("org/broken")


@pytest.mark.slow
def test_bytes_other_than_announced_are_refused(hub, run):
    hub.fail("model.safetensors", "corrupt")
    hub.fail("prototypes.safetensors", "corrupt")
    run("""
model = tiny_refined()
model.push_to_hub("org/pico-clip")
for load in (PicoModel.from_pretrained, PicoPrototypes.from_pretrained):
    for _ in range(2):  # the bad file is in the cache now, and refused from there too
        message = refusal(lambda: load("org/pico-clip"), ValueError)
        assert "SHA-256" in message and "force_download=True" in message
    load("org/pico-clip", force_download=True)
assert_equal(model, PicoModel.from_pretrained("org/pico-clip"))
""")


@pytest.mark.slow
def test_of_pickled_weights_only_the_conversion_by_the_hubs_bot_is_read(hub, run):
    run("""
tiny_encoder().push_to_hub("org/old-clip")
""")
    title = "Adding `safetensors` variant of this model"
    repository = hub.repositories["org/old-clip"]
    whole = dict(repository.commits[repository.branches["main"]])
    pickled = {**whole, "pytorch_model.bin": Entry(b"never opened", lfs=True)}
    del pickled["model.safetensors"]
    repository.commit("main", "pickle", pickled)
    for branch in ("refs/pr/1", "refs/pr/2"):
        repository.branches[branch] = repository.branches["main"]
        repository.commit(branch, title, whole)
    repository.pull_requests = [("mallory", title)]
    run("""
message = refusal(lambda: PicoModel.from_pretrained("org/old-clip"))
assert "'org/old-clip' has no model.safetensors" in message and "Pickle" in message
""")
    repository.pull_requests.append(("SFconvertbot", title))
    run("""
for options in ({}, {"revision": "refs/pr/2"}):
    model = PicoModel.from_pretrained("org/old-clip", num_prototypes=3, **options)
    for name, value in tiny_encoder().state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name
""")
    assert hub.seen("pytorch_model.bin") == 0


@pytest.mark.slow
def test_every_refusal_of_the_hub_is_one_line_with_name_and_remedy(run):
    run("""
model = tiny_refined()
model.push_to_hub("org/secret", private=True)
model.push_to_hub("org/open")
cases = {  # what the server answers: 401 without, 401 with a wrong, 404 with a foreign token
    "HTTP 401": lambda load: load("org/secret", token=False),
    "does not accept the token": lambda load: load("org/open", token="expired"),
    "HTTP 404": lambda load: load("org/secret", token="stranger"),
    "nor a repository": lambda load: load("org/no-such-thing"),
}
for load in (PicoModel.from_pretrained, PicoPrototypes.from_pretrained):
    for reason, case in cases.items():
        message = refusal(lambda: case(load))
        print(message)
        assert reason in message and "'org/" in message and "hf auth login" in message, message
for thing in (model, model.prototypes):
    for repository, token, reason in (
        ("org/open", "reader", "HTTP 403"), ("org/new", "stranger", "HTTP 403"),
        ("org/open", "expired", "does not accept the token"),
    ):
        message = refusal(lambda: thing.push_to_hub(repository, token=token))
        print(message)
        assert reason in message and f"'{repository}'" in message, message
        assert "hf auth login" in message
""")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_pushes_in_the_middle_of_training_are_whole(hub, run, strategy):
    run(
        """
from transformers import TrainerCallback
from pico_hf import PicoTrainer, PicoTrainingArguments
from tiny import tiny_rows
torch.manual_seed(0)
args = PicoTrainingArguments(
    output_dir="run", num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-2,
    use_cpu=True, disable_tqdm=True, report_to="none", push_to_hub=True,
    hub_model_id="org/trained", hub_strategy=sys.argv[1], freeze_encoder=True,
    load_best_model_at_end=False,  # the best one may be the first, whose weights are uniform
)
model = PicoModel.from_encoder(tiny_encoder(), num_prototypes=3, probe_size=16, pooled_share=0.0)
trainer = PicoTrainer(
    model, args, tiny_rows(32), tiny_rows(12), processing_class=tiny_processor()
)
class Wait(TrainerCallback):  # uploads run beside the training, which is over in no time here
    def on_epoch_begin(self, *args, **kwargs):
        trainer._finish_current_push()
trainer.add_callback(Wait())
trainer.train()
trainer.push_to_hub()
assert_equal(trainer.model.eval(), PicoModel.from_pretrained("org/trained"))
assert float(trainer.model.column_weights.std()) > 0
page = Path("run/README.md")
page.write_text("mine")
trainer.create_model_card()
assert page.read_text() == "mine"
""",
        strategy,
    )
    repository = hub.repositories["org/trained"]
    named = [(sha, title) for sha, title in repository.log if "in progress, epoch" in title]
    middle = [sha for sha, title in named if not title.endswith("checkpoint")]
    assert len(middle) >= 2
    for sha in middle:
        files = hub.files("org/trained", sha)
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files.keys()
        assert {"prototypes.safetensors", "prototypes.json", "plots/spectrum.png"} <= files.keys()
        assert not [name for name in files if "feature_cache" in name]
        assert not [name for name in files if name.startswith("optimizer")]
        weights = load(files["model.safetensors"])
        alone = load(files["prototypes.safetensors"])
        assert (alone["vision"] == weights["prototypes.vision"]).all()
        assert b"| dev | PICO |" in files["README.md"]
    assert b"pico_style" not in files["README.md"]
    assert "plots/feedback.png" in hub.files("org/trained")
    checkpoints = [name for name in hub.files("org/trained") if name.startswith("last-checkpoint")]
    assert bool(checkpoints) == (strategy == "checkpoint")


@pytest.mark.slow
def test_an_adapter_is_whole_at_every_push_and_merges_wherever_it_is_pulled(hub, run):
    run("""
import peft
from transformers import TrainerCallback
from pico_hf import PicoTrainer, PicoTrainingArguments, pico_lora_config
from tiny import tiny_rows
tiny_encoder().push_to_hub("org/clip")
model = PicoModel.from_pretrained("org/clip", num_prototypes=3, probe_size=16)
torch.manual_seed(0)
model = peft.get_peft_model(model, pico_lora_config(model, r=2))
args = PicoTrainingArguments(
    output_dir="run", num_train_epochs=3, per_device_train_batch_size=8, learning_rate=1e-2,
    use_cpu=True, disable_tqdm=True, report_to="none", push_to_hub=True,
    hub_model_id="org/adapter", hub_strategy="every_save", load_best_model_at_end=False,
)
trainer = PicoTrainer(
    model, args, tiny_rows(32), tiny_rows(12), processing_class=tiny_processor()
)
class Wait(TrainerCallback):  # uploads run beside the training, which is over in no time here
    def on_epoch_begin(self, *args, **kwargs):
        trainer._finish_current_push()
trainer.add_callback(Wait())
trainer.train()
trainer.push_to_hub()
live = trainer.pico_model.prototypes.modules_to_save["default"]
assert float(trainer.pico_model.column_weights.std()) > 0
torch.save({"scores": scores(model.eval()), "prototypes": live.state_dict()}, "trained.pt")
""")
    repository = hub.repositories["org/adapter"]
    middle = [sha for sha, title in repository.log if "in progress, epoch" in title]
    assert len(middle) >= 2
    for sha in middle:
        files = hub.files("org/adapter", sha)
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
        assert {"config.json", "tokenizer.json", "prototypes.json"} <= files.keys()
        assert "model.safetensors" not in files
        inside = load(files["adapter_model.safetensors"])
        alone = load(files["prototypes.safetensors"])
        assert (alone["vision"] == inside["base_model.model.prototypes.vision"]).all()
        assert b"load_adapter_model" in files["README.md"]
        assert b"base_model: org/clip" in files["README.md"]
    run(
        """
import peft
from transformers import AutoProcessor
from pico_hf import load_adapter_model
trained = torch.load("trained.pt")
def assert_prototypes(prototypes):
    for name, value in prototypes.state_dict().items():
        assert torch.equal(value, trained["prototypes"][name]), name
pulled = load_adapter_model("org/adapter")
assert torch.equal(scores(pulled), trained["scores"])
assert_prototypes(pulled.get_base_model().prototypes.modules_to_save["default"])
auto = peft.AutoPeftModel.from_pretrained(
    "org/adapter", import_allowlist=["pico_hf"], num_prototypes=3, probe_size=16
)
assert torch.equal(scores(auto), trained["scores"])
merged = PicoModel.from_pretrained("org/adapter")
torch.testing.assert_close(scores(merged), trained["scores"], rtol=1e-4, atol=1e-4)
assert_prototypes(merged.prototypes)
merged.push_to_hub("org/merged")
assert_equal(merged, PicoModel.from_pretrained("org/merged"))
assert_prototypes(PicoPrototypes.from_pretrained("org/merged"))
AutoProcessor.from_pretrained("org/adapter")
""",
        home="stranger",
    )
    assert "adapter_model.safetensors" not in hub.files("org/merged")


@pytest.mark.slow
def test_without_the_package_a_registered_model_loads_by_its_own_code(hub, run):
    run("""
model = tiny_refined().eval()
PicoModel.register_for_auto_class()
model.push_to_hub("org/with-code")
torch.save(scores(model), "scores.pt")
""")
    assert "modeling_pico.py" in hub.files("org/with-code")
    stranger = """
import sys
sys.modules["pico_hf"] = None  # as if it were not installed: importing it fails
import torch
from transformers import AutoModel
from tiny import tiny_inputs
try:
    AutoModel.from_pretrained("org/with-code", trust_remote_code=False)
    raise SystemExit("loaded without leave")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
model = AutoModel.from_pretrained("org/with-code", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert torch.equal(model(**tiny_inputs()).logits_per_image, torch.load("scores.pt"))
model.save_pretrained("saved-by-stranger")
"""
    run(stranger, start="", home="stranger")
    run("""
again = PicoModel.from_pretrained("saved-by-stranger")
assert torch.equal(scores(again), torch.load("scores.pt"))
PicoModel.register_for_auto_class()
again.save_pretrained("ours")
names = {path.name for path in Path("ours").glob("*.py")}
assert names == {path.name for path in Path("saved-by-stranger").glob("*.py")}
for name in names:  # written again from the copies, the modules are still the same
    assert (Path("ours") / name).read_text() == (Path("saved-by-stranger") / name).read_text(), name
""")


def test_the_package_writes_its_modules_so_that_they_need_no_package(tmp_path):
    from pico_hf.hub.remote_code import write_modules

    first = {path.name: path.read_text() for path in write_modules(tmp_path)}
    assert {"modeling_pico.py", "configuration_pico.py", "encoders_tokens.py"} <= first.keys()
    assert "trainer.py" not in first
    for name, text in first.items():
        assert not re.findall(r"^\s*(?:from|import) pico_hf.*", text, re.MULTILINE), name
        assert Path(name).stem in {"modeling_pico"} or f"from .{Path(name).stem} import" in "".join(
            first.values()
        ), f"transformers would not find {name}"
