"""`mage-tune publish` with the real client against a Hub of our own: what goes up, how, and that it comes back."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mage_tune.lm import load
from mage_tune.publish import Options, prepare
from mage_tune.publish.card import check_metadata, training_facts
from mage_tune.publish.contents import is_hub_id, read_run, without_paths
from mage_tune.publish.hub import HubError
from mage_tune.recipe import load_recipe
from tests.publish.fake_hub import CARD, TOKEN

REPO = "me/tiny-mage"
EVALUATED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "mage_tune.json",
    "recipe.yaml",
    "versions.json",
    "metrics.jsonl",
    "eval/results.json",
}
UNEVALUATED = EVALUATED - {"eval/results.json"}


def arguments(run, *more, repo=REPO):
    return ["publish", str(run), "--repo", repo, "--base-id", "me/base", *more]


def commits(hub, repo=REPO, branch="main"):
    """What was committed after the commit that a new repository begins with."""
    return hub.repos[repo].branches[branch][1:] if repo in hub.repos else []


def is_whole(files):
    return files.keys() >= EVALUATED


def split(folder, count):
    """Cut a checkpoint's one file of weights into several."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {key: names[i % count] for i, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: tensors[key] for key, home in weight_map.items() if home == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- what goes up ----------------------------------------------------------------------------------------------------


def test_one_commit_with_exactly_what_is_on_the_list(hub, client, run_folder):
    done = client.run(*arguments(run_folder))
    assert (done.code, done.err) == (0, "")
    [commit] = commits(hub)
    assert done.out.endswith(f"published to {REPO}, commit {commit.id}\n")
    plots = {name for name in commit.files if name.endswith(".png")}
    assert {"eval/ce_gap.png", "eval/ce_gap-dark.png"} <= plots
    assert commit.files.keys() - plots == EVALUATED | {".gitattributes"}
    for name in EVALUATED | plots:
        assert f"  {name}\n" in done.out
    assert "MB  in all" in done.out


def test_nothing_private_is_in_the_pushed_bytes(hub, client, run_folder, secret_home):
    assert client.run(*arguments(run_folder)).code == 0
    assert client.run(*arguments(run_folder, "--merged", repo="me/whole")).code == 0
    private = [b"alice-at-acme", str(secret_home.parent).encode(), TOKEN.encode(), b"pickle"]
    assert any(private[0] in file.read_bytes() for file in run_folder.glob("*.yaml"))  # the test could fail
    for name, data in hub.pushed():
        for word in private:
            assert word not in data, f"{name} holds {word!r}"


def test_the_recipe_goes_up_resolved_with_the_bases_id_and_bare_file_names(hub, client, run_folder, tmp_path):
    client.run(*arguments(run_folder))
    (tmp_path / "recipe.yaml").write_bytes(commits(hub)[0].files["recipe.yaml"])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.model.path == "me/base"
    assert [source.path for source in recipe.data.sources] == ["heldout.jsonl", "someone/some-text"]
    assert (recipe.output, recipe.eval.text, recipe.train.steps) == ("tiny", "heldout.jsonl", 200)


def test_publishing_again_commits_nothing_and_a_change_commits_once(hub, client, make_run, run_folder, base):
    run = run_folder.with_name("changing")
    shutil.copytree(run_folder, run)
    client.run(*arguments(run))
    done = client.run(*arguments(run))
    assert (done.code, len(commits(hub))) == (0, 1), done.err
    assert done.out.endswith(f"{REPO} holds all of this already; no commit made\n")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2)
    (run / "eval" / "ce_gap.png").unlink()
    assert client.run(*arguments(run)).code == 0
    first, second = commits(hub)
    assert "eval/ce_gap.png" in first.files.keys() - second.files.keys()
    assert second.files["metrics.jsonl"] == first.files["metrics.jsonl"] * 2
    assert client.run(*arguments(run)).out.endswith("no commit made\n")


def test_private_branch_collection_and_organisation(hub, client, run_folder):
    hub.collections["me/mage-0123"] = []
    more = ("--private", "--revision", "v1", "--collection", "me/mage-0123")
    done = client.run(*arguments(run_folder, *more, repo="my-org/tiny"))
    assert (done.code, done.err) == (0, "")
    repo = hub.repos["my-org/tiny"]
    assert repo.private
    assert (len(repo.branches["main"]), is_whole(repo.branches["v1"][-1].files)) == (1, True)
    assert hub.collections == {"me/mage-0123": ["my-org/tiny"]}
    assert "no commit made" in client.run(*arguments(run_folder, *more, repo="my-org/tiny")).out


def test_a_dry_run_writes_what_would_be_published_and_asks_the_hub_for_nothing_else(hub, client, run_folder):
    done = client.run(*arguments(run_folder, "--dry-run"))
    assert (done.code, done.err) == (0, "")
    assert [path for _, path in hub.requests] == ["/api/models/me/base"]  # for the licence
    folder = run_folder / "publish"
    written = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert written["README.md"].decode() in done.out
    client.run(*arguments(run_folder))
    pushed = commits(hub)[0].files
    assert written == {name: data for name, data in pushed.items() if name != ".gitattributes"}


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card_has_metadata_for_the_hub_and_every_number_of_the_evaluation(hub, client, run_folder):
    client.run(*arguments(run_folder))
    assert ("POST", "/api/validate-yaml") in hub.requests
    card = ModelCard(commits(hub)[0].files["README.md"].decode())
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("me/base", "adapter", "peft")
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["en"], "text-generation")
    assert data.datasets == ["someone/some-text"]
    assert {"lora", "block-diffusion", "mage_tune"} <= set(data.tags)
    result = json.loads((run_folder / "eval" / "results.json").read_text())
    by_name = {found.metric_name: found.metric_value for found in data.eval_results}
    assert data.model_name == "tiny-mage"
    assert by_name["recall@32"] == round(result["arms"]["adapter"]["recall@32"]["mean"], 4)
    for arm in ("base", "adapter"):
        for name, estimate in result["arms"][arm].items():
            assert f"{estimate['mean']:z.3f} ({estimate['low']:z.3f} to" in card.text, name
    for words in ("768 tokens of context", "2602.14209", "## Limits", "| seed | 0 |", "![ce_gap.png](eval/ce_gap.png)"):
        assert words in card.text
    check_metadata(data.to_dict())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"base_model": "/home/me/base"}, "base_model"),
        ({"base_model": "base"}, "base_model"),
        ({"license": "Apache 2.0"}, "license"),
        ({"license": "other"}, "other"),
        ({"library_name": "transformer"}, "library_name"),
        ({"licence": "mit"}, "licence"),
        ({"datasets": []}, "datasets"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_refused_here(change, field):
    good = {
        "base_model": "me/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["lora"],
    }
    check_metadata(good)
    with pytest.raises(ValueError, match=field):
        check_metadata(good | change)


def test_the_card_tells_of_a_base_held_in_four_bits(unevaluated):
    run = read_run(unevaluated)
    told = "base model held in"
    assert told not in training_facts(run)
    model = run.recipe.model.model_copy(update={"quantise": "nf4"})
    quantised = replace(run, recipe=run.recipe.model_copy(update={"model": model}))
    assert training_facts(quantised)[told] == "4 bits (NF4, scales quantised too)"


def test_an_unevaluated_run_needs_a_flag_and_its_card_says_so(hub, client, unevaluated):
    run = unevaluated
    done = client.run(*arguments(run))
    assert (done.code, hub.requests) == (2, [])
    assert done.err == f"error: {run}: not evaluated; run mage-tune eval {run} first, or pass --without-eval\n"
    assert client.run(*arguments(run, "--without-eval")).code == 0
    card = ModelCard(commits(hub)[0].files["README.md"].decode())
    assert "**This model has not been evaluated.**" in card.text
    assert card.data.eval_results is None


def test_measured_keys_per_layer_go_along_and_the_card_says_how_to_use_them(client, unevaluated, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unevaluated, run)
    asked = arguments(run, "--without-eval", "--dry-run")
    published, budgets = run / "publish", run / "layer_budgets.json"
    assert client.run(*asked).code == 0
    assert "layer_budgets.json" not in (published / "README.md").read_text()
    found = {"budget": 16, "dense_layers": 1, "budgets": {"1": 24}, "text": "/home/me/text.npy"}
    budgets.write_text(json.dumps(found))
    assert client.run(*asked).code == 0
    assert json.loads((published / "layer_budgets.json").read_text()) == found | {"text": "text.npy"}
    assert f'hf_hub_download("{REPO}", "layer_budgets.json")' in (published / "README.md").read_text()
    budgets.write_text(json.dumps(found | {"budget": 0}))
    done = client.run(*asked)
    assert done.code == 2 and "layer_budgets.json: budget" in done.err


# --- it comes back ---------------------------------------------------------------------------------------------------

BACK = """
import contextlib, io, json, re, torch, mage_tune
from pathlib import Path
from huggingface_hub import hf_hub_download
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
ids = torch.arange(4, 36).view(2, 16)
lm = mage_tune.load("me/tiny-mage")
assert lm.family.block_size == 8 and lm.tokenizer is not None
base = AutoModelForCausalLM.from_pretrained("me/base")
peft = PeftModel.from_pretrained(base, "me/tiny-mage").eval()
conversion = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/base"), "me/tiny-mage")
on_top = PeftModel.from_pretrained(conversion.merge_and_unload(), "me/tuned-on-adapter").eval()
found = {
    "adapter": lm.logits(ids).tolist(),
    "peft": peft(input_ids=ids).logits.tolist(),
    "merged": mage_tune.load("me/whole").logits(ids).tolist(),
    "tuned": mage_tune.load("me/tuned").logits(ids).tolist(),
    "stacked": mage_tune.load("me/tuned-on-adapter").logits(ids).tolist(),
    "stacked peft": on_top(input_ids=ids).logits.tolist(),
    "stacked plain": mage_tune.load("me/tuned-on-adapter").model(input_ids=ids).logits.tolist(),
    "stacked by hand": mage_tune.load("me/tiny-mage", adapter="me/tuned-on-adapter").logits(ids).tolist(),
}
card = Path(hf_hub_download("me/tiny-mage", "README.md")).read_text()
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    exec(re.search(r"```python\\n(.*?)```", card, re.S)[1])
found["quick start"] = [len(out.tokens), printed.getvalue() == out.text + "\\n"]
print(json.dumps(found))
"""


def test_round_trip_by_id_in_a_clean_process(hub, client, make_run, run_folder, base):
    """The adapter; the same merged, as a conversion is published; and what was tuned on the local copy of that."""
    done = client.run(*arguments(run_folder))
    assert (done.code, done.err) == (0, "")
    done = client.run(*arguments(run_folder, "--merged", repo="me/whole"))
    assert (done.code, done.err) == (0, "")
    whole = run_folder / "publish-merged"
    tuned = make_run("tuned", whole, train_mask_embedding=True)
    done = client.run("publish", str(tuned), "--repo", "me/tuned", "--base-id", "me/whole", "--without-eval")
    assert (done.code, done.err) == (0, "")
    command = ("publish", str(tuned), "--repo", "me/tuned-on-adapter", "--base-id", REPO, "--without-eval")
    done = client.run(*command)
    assert (done.code, done.err) == (0, "")

    found = json.loads(client.python(BACK).splitlines()[-1])
    ids = torch.arange(4, 36).view(2, 16)
    expected = load(base, adapter=run_folder).logits(ids)
    assert torch.equal(torch.tensor(found["adapter"]), expected)
    torch.testing.assert_close(torch.tensor(found["merged"]), expected, rtol=0, atol=1e-4)
    assert not expected.allclose(load(base).logits(ids), atol=1e-2)
    both = load(whole, adapter=tuned).logits(ids)
    assert not both.allclose(expected, atol=1e-2)
    assert torch.equal(torch.tensor(found["tuned"]), both)
    # The same two, the lower one an adapter still: our loader merges it, plain PEFT is told to.
    torch.testing.assert_close(torch.tensor(found["stacked"]), both, rtol=0, atol=1e-4)
    assert found["stacked by hand"] == found["stacked"]
    torch.testing.assert_close(
        torch.tensor(found["stacked peft"]), torch.tensor(found["stacked plain"]), rtol=0, atol=1e-4
    )
    with torch.no_grad():
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_folder).eval()
        assert torch.equal(torch.tensor(found["peft"]), plain(input_ids=ids).logits)
    count, is_as_printed = found["quick start"]
    assert 0 < count <= 16 and is_as_printed


def test_merged_weights_have_a_card_of_their_own(hub, client, run_folder):
    client.run(*arguments(run_folder, "--merged", repo="me/whole"))
    [commit] = commits(hub, "me/whole")
    assert {"model.safetensors", "config.json", "tokenizer.json", "merge.json"} < commit.files.keys()
    assert not {"adapter_config.json", "adapter_model.safetensors", "mage_tune.json"} & commit.files.keys()
    card = ModelCard(commit.files["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("finetune", "transformers")
    assert "lora" not in card.data.tags
    assert re.search(r"largest difference \d\.\d\de-0[4-9], mean", card.text)


def test_help(client):
    done = client.run("publish", "--help")
    assert (done.code, done.err) == (0, "")
    for option in ("--repo", "--base-id", "--private", "--revision", "--merged", "--collection", "--dry-run"):
        assert option in done.out


# --- early checks ----------------------------------------------------------------------------------------------------


def test_wrong_ids_are_refused_before_anything_is_asked(hub, client, run_folder, base):
    wrong = {
        ("publish", str(run_folder), "--repo", "tiny"): "--repo tiny: give it in full, as NAMESPACE/NAME",
        ("publish", str(run_folder), "--repo", "me/ti ny"): "--repo me/ti ny: not a valid repository id: ",
        ("publish", str(run_folder), "--repo", REPO): f"{base}: the base model is a local folder; give its Hub id "
        "(--base-id NAMESPACE/NAME)",
        ("publish", str(run_folder), "--repo", REPO, "--base-id", "base"): "--base-id base: give it in full",
        ("publish", "nowhere", "--repo", REPO): "nowhere: no such run folder",
        ("publish", str(base), "--repo", REPO): f"{base}: no adapter_model.safetensors; only a finished run",
    }
    for command, line in wrong.items():
        done = client.run(*command)
        assert done.err.startswith(f"error: {line}"), done
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert hub.requests == []


def test_random_weights_are_not_published(hub, client, make_run, base):
    run = make_run("random", base)
    random = (run / "recipe.yaml").read_text().replace(f"{{path: {base}}}", "{family: converted, random_weights: {}}")
    (run / "recipe.yaml").write_text(random.replace("converted,", "converted, mask_id: 3, stop_ids: [1], pad_id: 0,"))
    done = client.run(*arguments(run))
    assert (done.code, hub.requests) == (2, [])
    assert "this run trained random weights; there is no base model to publish it for" in done.err


def test_a_token_that_cannot_write_there_is_refused_before_anything_is_written(hub, client, run_folder):
    def refused(repo=REPO):
        done = client.run(*arguments(run_folder, repo=repo))
        assert (done.code, list(hub.repos), done.err.count("\n")) == (2, ["me/base"], 1)
        return done.err

    assert refused("them/tiny") == "error: --repo them/tiny: the token belongs to me, who is no member of them\n"
    hub.role = "read"
    assert "can only read" in refused()
    hub.role = "fineGrained"
    assert "no write access to me or me/tiny-mage" in refused()
    hub.scopes = [{"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}]
    assert "no write access" in refused()
    hub.scopes[0]["permissions"] += ["repo.write"]
    assert client.run(*arguments(run_folder)).code == 0


def test_an_unknown_base_or_licence_is_refused(hub, client, run_folder):
    command = ["publish", str(run_folder), "--repo", REPO, "--base-id"]
    done = client.run(*command, "me/nothing")
    assert (done.code, done.err) == (
        2, "error: me/nothing: no such base model on the Hub; give the right id (--base-id)\n"
    )  # fmt: skip
    del hub.repos["me/base"].branches["main"][0].files["README.md"]
    done = client.run(*command, "me/base")
    assert (done.code, done.err.partition(";")[0]) == (2, "error: me/base: its licence is unknown")
    assert list(hub.repos) == ["me/base"]
    assert client.run(*command, "me/base", "--license", "mit").code == 0
    assert ModelCard(commits(hub)[0].files["README.md"].decode()).data.license == "mit"


def test_one_repository_does_not_hold_both_kinds_nor_change_its_visibility(hub, client, run_folder):
    client.run(*arguments(run_folder))
    done = client.run(*arguments(run_folder, "--merged"))
    assert (done.code, len(commits(hub))) == (2, 1)
    assert "holds an adapter; publish the merged weights to a repository of their own" in done.err
    assert "holds a whole model" in client.run(*arguments(run_folder, repo="me/base")).err
    done = client.run(*arguments(run_folder, "--private"))
    assert (done.code, done.err) == (
        2, f"error: {REPO}: exists and is public; make it private in its settings, or leave out --private\n"
    )  # fmt: skip


def test_a_path_or_token_that_slipped_in_stops_everything(hub, client, run_folder, secret_home):
    run = run_folder.with_name("leaking")
    shutil.copytree(run_folder, run)
    for secret, named in ((str(secret_home / "x"), f"the path {secret_home}"), (TOKEN, "your token")):
        (run / "versions.json").write_text(
            json.dumps({"device": "x", "mage_tune": 1, "torch": 1, "transformers": 1, "peft": 1, "note": secret})
        )
        done = client.run(*arguments(run))
        assert (done.code, list(hub.repos)) == (2, ["me/base"])
        assert done.err.startswith(f"error: versions.json: holds {named}")
        assert TOKEN not in done.out + done.err


def test_without_a_token(hub, run_folder, monkeypatch):
    monkeypatch.setattr("mage_tune.publish.hub.get_token", lambda: None)
    with pytest.raises(HubError, match=r"^no Hub token: log in \(hf auth login\) or set HF_TOKEN$"):
        prepare(run_folder, Options(repo_id=REPO, base_id="me/base"))


# --- faults ----------------------------------------------------------------------------------------------------------


def test_whatever_breaks_the_second_run_completes_and_no_half_is_ever_seen(hub, client, base, unevaluated):
    command = arguments(unevaluated, "--without-eval")
    client.run(*command)
    sequence = list(hub.requests)
    assert sequence[0] == ("GET", "/api/whoami-v2")
    assert sequence[-1] == ("POST", f"/api/models/{REPO}/commit/main")
    assert sum(path.startswith("/lfs/") for _, path in sequence) == 2
    for number, (method, path) in enumerate(sequence):
        for kind in ("drop", "drop answer", "500", "429"):
            hub.reset()
            hub.seed("me/base", base, CARD)
            # From this request on it stays broken, so that the client's own retries do not hide it.
            hub.fault = lambda i, m, p, n=number, kind=kind: kind if i >= n else None
            done = client.run(*command)
            where = f"{kind} at {method} {path}: {done}"
            assert (done.code, done.err.count("\n"), done.err[:7]) == (2, 1, "error: "), where
            assert all(commit.files.keys() >= UNEVALUATED for commit in commits(hub)), where
            hub.fault = lambda i, m, p: None
            done = client.run(*command)
            assert done.code == 0, where
            [commit] = commits(hub)
            assert commit.files.keys() == UNEVALUATED | {".gitattributes"}, where


def test_what_was_uploaded_before_a_failure_is_not_uploaded_again(hub, client, make_run, base):
    """Merged weights in several files, as large models have them; the connection breaks in the second."""
    shards = base.with_name("sharded")
    shutil.copytree(base, shards)
    split(shards, 3)
    run = make_run("sharded", shards)
    command = arguments(run, "--without-eval", "--merged", "--license", "mit")
    uploads = []

    def broken(number, method, path):
        uploads.extend([path] if method == "PUT" else [])
        return "drop" if method == "PUT" and len(set(uploads)) > 1 else None

    hub.fault = broken
    done = client.run(*command)
    assert (done.code, commits(hub)) == (2, []), done
    assert "the connection broke" in done.err
    complete = len(hub.blobs)
    hub.requests.clear()
    hub.fault = lambda number, method, path: None
    merged = (run / "publish-merged" / "merge.json").stat().st_mtime_ns
    done = client.run(*command)
    assert done.code == 0, done
    assert (run / "publish-merged" / "merge.json").stat().st_mtime_ns == merged  # nor is it merged again
    assert 1 <= complete < 3
    assert [method for method, _ in hub.requests].count("PUT") == 3 - complete
    [commit] = commits(hub)
    assert len([name for name in commit.files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]) == 3


def test_a_hub_that_hangs_is_given_up_on_and_the_second_run_completes(hub, client, base, unevaluated):
    command = arguments(unevaluated, "--without-eval")
    client.run(*command)
    sequence = list(hub.requests)
    for number, (method, path) in enumerate(sequence):
        hub.reset()
        hub.seed("me/base", base, CARD)
        hub.fault = lambda i, m, p, n=number: "hang" if i == n else None
        done = client.run(*command, patience=0.3)
        where = f"{method} {path}: {done}"
        # The client tries some requests again by itself, and then nothing is left to do.
        assert done.code == 0 or re.match(r"error: .*: the connection broke \(.*timed out\); run the", done.err), where
        assert all(commit.files.keys() >= UNEVALUATED for commit in commits(hub)), where
        hub.fault = lambda i, m, p: None
        assert client.run(*command).code == 0, where
        [commit] = commits(hub)
        assert commit.files.keys() == UNEVALUATED | {".gitattributes"}, where


def test_a_slow_hub_is_waited_for(hub, client, unevaluated):
    hub.fault = lambda number, method, path: "slow"
    assert client.run(*arguments(unevaluated, "--without-eval")).code == 0
    assert len(commits(hub)) == 1


@pytest.mark.parametrize(
    ("status", "where", "line"),
    [
        (401, "/api/whoami-v2", "checking the token: the token is not accepted"),
        (403, "/api/models/me/tiny-mage/commit/main", "uploading to me/tiny-mage: the token may not write there"),
        (404, "/api/models/me/tiny-mage/preupload/main", "uploading to me/tiny-mage: not found"),
        (409, "/api/models/me/tiny-mage/commit/main", "uploading to me/tiny-mage: it conflicts with another change"),
        (412, "/api/models/me/tiny-mage/commit/main", "uploading to me/tiny-mage: somebody else changed"),
        (429, "/api/repos/create", "creating me/tiny-mage: too many requests"),
        ("page", "/api/validate-yaml", "uploading to me/tiny-mage: the answer is not the Hub's"),
        ("page", "/api/repos/create", "creating me/tiny-mage: the Hub has a problem (HTTP 502)"),
        (503, "/api/models/me/base", "looking up the base model me/base: the Hub has a problem (HTTP 503)"),
    ],
)
def test_an_error_of_the_hub_is_one_line_with_what_to_do(hub, client, run_folder, status, where, line):
    hub.fault = lambda number, method, path: str(status) if path == where else None
    done = client.run(*arguments(run_folder))
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"error: {line}")
    assert commits(hub) == []


def test_a_change_between_reading_and_committing_is_not_overwritten(hub, client, run_folder):
    client.run(*arguments(run_folder))
    hub.repos[REPO].branches["main"][-1].files.pop("metrics.jsonl")

    def meddle(number, method, path):
        if path.endswith("/preupload/main"):
            hub.repos[REPO].add("main", {"theirs.txt": b"hello"}, "theirs")

    hub.fault = meddle
    done = client.run(*arguments(run_folder))
    assert (done.code, hub.repos[REPO].branches["main"][-1].files) == (2, {"theirs.txt": b"hello"})
    assert "somebody else changed the repository in the meantime; publish again" in done.err


def test_a_missing_collection_is_told_apart_from_a_failed_upload(hub, client, run_folder):
    done = client.run(*arguments(run_folder, "--collection", "me/none-1"))
    assert (done.code, len(commits(hub))) == (2, 1)
    assert done.err.startswith(f"error: {REPO} is published, but adding it to collection me/none-1: not found")


# --- words -----------------------------------------------------------------------------------------------------------


def test_local_paths_are_cut_down_to_their_names():
    tree = {
        "a": "/home/u/x.jsonl",
        "b": ["C:\\Users\\u\\y.txt", "~/z", "../u/w/"],
        "c": "me/base",
        "d": 3,
        "e": "a*b",
        "f": "/home/u/*.parquet",
    }
    cut = {"a": "x.jsonl", "b": ["y.txt", "z", "w"], "c": "me/base", "d": 3, "e": "a*b", "f": "*.parquet"}
    assert without_paths(tree) == cut


@pytest.mark.parametrize("text", ["/me/base", "base", "a/b/c", "data/x.jsonl", "~/base", "me/ba se", "", None])
def test_what_is_no_hub_id(text):
    assert not is_hub_id(text)


# --- the demo ---

ROOT = Path(__file__).resolve().parents[2]
BASE, CONVERSION, DEMO = ROOT / "models/smollm2-135m", ROOT / "adapters/smollm2-135m-diffusion", ROOT / "runs/demo"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
REAL_BACK = """
import json, torch, mage_tune
print(json.dumps(mage_tune.load("me/smollm2-mage").logits(torch.arange(1000, 1064).view(1, 64)).tolist()))
"""


@pytest.mark.slow
def test_the_demo_run_on_the_published_conversion_comes_back(hub, client, tmp_path):
    """SmolLM2: the conversion adapter and the demo's adapter on top of it, both as adapters."""
    if not (BASE.is_dir() and (DEMO / "eval" / "results.json").is_file()):
        pytest.skip("needs what make demo leaves behind")
    hub.seed(SMOLLM2, BASE, CARD)
    for run, repo, base_id, more in (
        (CONVERSION, "me/smollm2-diffusion", SMOLLM2, ["--without-eval"]),
        (DEMO, "me/smollm2-mage", "me/smollm2-diffusion", []),
    ):
        shutil.copytree(run, tmp_path / run.name)
        done = client.run("publish", str(tmp_path / run.name), "--repo", repo, "--base-id", base_id, *more)
        assert (done.code, done.err) == (0, "")
    found = torch.tensor(json.loads(client.python(REAL_BACK).splitlines()[-1]))
    ids = torch.arange(1000, 1064).view(1, 64)
    assert torch.equal(found, load(ROOT / "models/smollm2-135m-diffusion", adapter=DEMO).logits(ids))
    ours = [(name, data) for name, data in hub.pushed() if name.startswith("me/")]
    assert not [
        name for name, data in ours if re.search(rb"%s|/home/|/root/|/tmp/" % re.escape(str(ROOT)).encode(), data)
    ]


# --- the real Hub ----------------------------------------------------------------------------------------------------

CREATE = """
from huggingface_hub import HfApi
HfApi().create_repo("{base_id}", private=True)
HfApi().upload_folder(repo_id="{base_id}", folder_path="{base}")
"""
LOAD = """
import json, torch, mage_tune
print(json.dumps(mage_tune.load("{repo}").logits(torch.arange(4, 36).view(2, 16)).tolist()))
"""
DELETE = """
from huggingface_hub import HfApi
for repo in ("{base_id}", "{repo}"):
    HfApi().delete_repo(repo, missing_ok=True)
"""


def test_live_hub(request, live_client, base, run_folder):
    """For maintainers: HF_TOKEN=... pytest tests/publish -k live_hub --live-hub NAMESPACE; it leaves nothing behind."""
    namespace = request.config.getoption("--live-hub", default=None)
    names = {"base": base, "base_id": f"{namespace}/mage-tune-live-base", "repo": f"{namespace}/mage-tune-live"}
    command = ["publish", str(run_folder), "--repo", names["repo"], "--base-id", names["base_id"], "--private"]
    try:
        live_client.python(CREATE.format(**names))
        done = live_client.run(*command, "--license", "apache-2.0")
        assert (done.code, done.err) == (0, "")
        assert "no commit made" in live_client.run(*command, "--license", "apache-2.0").out
        found = torch.tensor(json.loads(live_client.python(LOAD.format(**names)).splitlines()[-1]))
        assert torch.equal(found, load(base, adapter=run_folder).logits(torch.arange(4, 36).view(2, 16)))
    finally:
        live_client.python(DELETE.format(**names))
