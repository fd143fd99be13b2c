"""Downloads from a server on the loopback: resumed, checked, placed whole; what goes wrong is one line."""

import hashlib
import json
import os
import threading
import time
from types import SimpleNamespace

import pytest

from mpformer.model.weights import fetching
from mpformer.model.weights.fetching import AnswerError, Checks, check_reachable, download
from mpformer.model.weights.hub import Repository, hub_url
from mpformer.types import InputError, RunError
from tests.model.weights import hub_server
from tests.servers import closed_port

DATA = os.urandom(500_000)
SHA256, MD5 = hashlib.sha256(DATA).hexdigest(), hashlib.md5(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    """No proxy and no token of the machine that runs the tests."""
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch):
    with hub_server.running() as running:
        running.plain["model.pkl"] = DATA
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def url(hub):
    return f"{hub.url}/files/model.pkl"


def ranges(hub):
    return [wanted for _, wanted, _ in hub.requests]


def test_a_file_is_fetched_whole_and_nothing_else_is_left(hub, url, tmp_path):
    target = tmp_path / "deep" / "model.pkl"
    download(url, target, Checks(sha256=SHA256, md5_start=MD5[:6]))
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["model.pkl"]
    assert ranges(hub) == [None]


def test_connections_that_break_are_gone_on_with(hub, url, tmp_path):
    hub.cuts = [100_000, 50_000]
    download(url, tmp_path / "a", Checks(sha256=SHA256))
    assert (tmp_path / "a").read_bytes() == DATA
    # each time one byte of the part anew
    assert ranges(hub) == [None, "bytes=99999-", "bytes=149998-"]


def test_an_interrupted_download_is_gone_on_with_by_the_next_call(hub, url, tmp_path):
    hub.cuts = [100_000, 0]
    with pytest.raises(RunError, match=r"broke off after 0\.1 MB .*the same command goes on from there"):
        download(url, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    hub.requests.clear()
    download(url, tmp_path / "a", Checks(sha256=SHA256))
    assert (tmp_path / "a").read_bytes() == DATA
    assert ranges(hub)[0].startswith("bytes=9999")


def test_a_part_that_is_whole_but_was_not_placed_is_placed(hub, url, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA)
    (tmp_path / "a.part.json").write_text(json.dumps({"url": url, "etag": f'"{SHA256}"'}))
    download(url, tmp_path / "a", Checks(sha256=SHA256))
    assert ranges(hub) == [f"bytes={len(DATA) - 1}-"]


@pytest.mark.parametrize(
    "note",
    [
        {"url": "URL", "etag": '"another version"'},
        {"url": "URL", "etag": None},
        {"url": "URL", "etag": f'W/"{SHA256}"'},
        {"url": "http://elsewhere/model.pkl", "etag": f'"{SHA256}"'},
    ],
    ids=["changed", "without a version", "weak version", "another URL"],
)
def test_a_part_of_another_file_is_not_continued(hub, url, tmp_path, note):
    (tmp_path / "a.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.part.json").write_text(json.dumps(note).replace("URL", url))
    download(url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_server_without_ranges_sends_all_of_it_again(hub, url, tmp_path):
    hub.ranges, hub.cuts = False, [100_000]
    download(url, tmp_path / "a", Checks(sha256=SHA256))
    assert (tmp_path / "a").read_bytes() == DATA


def test_a_server_that_always_breaks_off_is_given_up(hub, url, tmp_path):
    hub.ranges, hub.cuts = False, [100_000] * 50
    with pytest.raises(RunError, match="broke off"):
        download(url, tmp_path / "a")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("checks", [Checks(sha256="0" * 64), Checks(md5_start="000000")])
def test_a_wrong_checksum_is_refused_and_what_came_is_deleted(hub, url, tmp_path, checks):
    with pytest.raises(RunError, match="not the file that is expected") as caught:
        download(url, tmp_path / "a", checks)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.name in ("a", "a.part")]


@pytest.mark.parametrize(
    ("status", "kind"), [(500, RunError), (503, RunError), (429, RunError), (403, InputError)]
)
def test_what_a_server_refuses_is_one_line_at_once(hub, url, tmp_path, status, kind):
    hub.fails = status
    with pytest.raises(kind, match=str(status)):
        download(url, tmp_path / "a")
    assert len(hub.requests) == 1


def test_an_absent_file_is_said_to_be(hub, tmp_path):
    with pytest.raises(AnswerError, match=r"/files/none\.pkl: there is no such file \(HTTP 404"):
        download(f"{hub.url}/files/none.pkl", tmp_path / "a")


def test_no_server_is_one_line_at_once(tmp_path, monkeypatch):
    start = time.monotonic()
    with pytest.raises(RunError, match=r"127\.0\.0\.1 is not reachable: Connection refused"):
        download(f"http://127.0.0.1:{closed_port()}/a", tmp_path / "a")
    # a name that is looked up for ever, as without a network
    held, looked_up = threading.Event(), []

    def look_up(host, *args, **kwargs):
        looked_up.append(host)
        held.wait(30)
        raise OSError("no answer")

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    monkeypatch.setattr(fetching, "SECONDS_TO_CONNECT", 0.2)
    with pytest.raises(RunError, match=r"nowhere\.example is not reachable: no connection in 0\.2 s"):
        check_reachable("https://nowhere.example/a")
    held.set()
    assert looked_up == ["nowhere.example"]
    assert time.monotonic() - start < 5


def test_a_proxy_is_what_has_to_be_reachable(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", hub.url)
    check_reachable("http://nowhere.example/a")
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{closed_port()}")
    with pytest.raises(RunError, match=r"127\.0\.0\.1 is not reachable"):
        check_reachable("http://nowhere.example/a")


def test_a_disk_that_cannot_be_written_is_one_line(hub, url, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be written.*MPFORMER_CACHE"):
        download(url, tmp_path / "file" / "a")


# --- sizes that a server tells ---------------------------------------------------------------------


@pytest.mark.parametrize("told", [str((64 << 30) + 1), "9" * 5000], ids=["too many", "no number for Python"])
def test_a_file_that_is_told_to_be_too_large_is_refused_before_it_comes(hub, url, tmp_path, told):
    hub.lengths = told
    with pytest.raises(RunError, match=r"MB are told, and at most 68719\.5 MB are taken of such a file$"):
        download(url, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_more_than_was_allowed_for_is_not_taken(hub, url, tmp_path):
    hub.lengths = ""  # none is told
    download(url, tmp_path / "a", Checks(sha256=SHA256), largest=len(DATA))
    with pytest.raises(RunError, match=r"more come than were told, and at most 0\.5 MB are taken"):
        download(url, tmp_path / "b", largest=len(DATA) - 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_the_disk_has_no_room_for_is_refused_before_it_comes(hub, url, tmp_path, monkeypatch):
    room = SimpleNamespace(free=len(DATA) - 1)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: room)
    with pytest.raises(RunError, match=r"0\.5 MB to come, and there are 0\.5 MB free in .*MPFORMER_CACHE"):
        download(url, tmp_path / "a")
    room.free = len(DATA)
    download(url, tmp_path / "a", Checks(sha256=SHA256))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
def test_a_text_of_a_hub_is_no_weights_in_size(hub, tmp_path, name):
    hub.add("owner/name", {**SMALL, name: b" " * ((16 << 20) + 1)})
    with pytest.raises(RunError, match=rf"{name}: 16\.8 MB are told, and at most 16\.8 MB are taken"):
        Repository.parse("owner/name").fetch(tmp_path)


def test_a_list_of_more_shards_than_a_model_has_is_refused(hub, tmp_path):
    index = {"weight_map": {str(i): f"model-{i}.safetensors" for i in range(257)}}
    hub.add("owner/name", {**SMALL, "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(InputError, match=r"index\.json: lists 257 shards, at most 256 are expected"):
        Repository.parse("owner/name").fetch(tmp_path)
    assert not [path for path in hub.paths() if "model-" in path]


@pytest.mark.parametrize(
    "address",
    [
        "huggingface.co",
        "ftp://hub",
        "https://",
        "https://hub:99999",
        "https://hub/?a=1",
        "https://h\u00fcb",
        "file:///etc",
    ],
)
def test_an_address_of_a_hub_that_is_none_is_one_line_at_once(hub, monkeypatch, tmp_path, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(fetching, "Attempt", lambda url: pytest.fail("looked for"))
    with pytest.raises(
        InputError, match=r"^HF_ENDPOINT: an address such as https://huggingface\.co is ex"
    ) as told:
        Repository.parse("owner/name").fetch(tmp_path)
    assert "\n" not in str(told.value)


def test_a_password_in_the_address_of_a_hub_is_not_repeated(monkeypatch):
    for address in (
        "https://me:hunter2@hub",
        "https://me:hunter2@hub?a",
        "me:hunter2@hub",
        "ftp://me:hunter2@hub",
    ):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(InputError) as told:
            hub_url()
        assert "hunter2" not in str(told.value)
    monkeypatch.setenv("HF_ENDPOINT", " https://hub.example.org/ ")
    assert hub_url() == "https://hub.example.org"
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub_url() == "https://huggingface.co"


# --- repositories of a hub ------------------------------------------------------------------------

SMALL = {"config.json": b"{}", "preprocessor_config.json": b"{}"}


def test_a_repository_is_fetched_at_one_commit(hub, tmp_path):
    commit = hub.add("owner/name", {**SMALL, "model.safetensors": DATA, "pytorch_model.bin": b"old"})
    folder = Repository.parse("owner/name").fetch(tmp_path)
    assert folder.name == commit
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {**SMALL, "model.safetensors": DATA}
    assert hub.paths()[0] == "/owner/name/resolve/main/config.json"
    # where the server forwards to is its own matter
    asked = [path for path in hub.paths()[1:] if "/resolve/moved/" not in path]
    assert all(f"/resolve/{commit}/" in path or path.startswith("/store/") for path in asked)


def test_a_commit_that_moves_between_two_calls_leaves_no_mixture(hub, tmp_path):
    hub.add("owner/name", {**SMALL, "model.safetensors": DATA})
    hub.cuts = [100_000, 0]
    with pytest.raises(RunError):
        Repository.parse("owner/name").fetch(tmp_path)
    newer = {"config.json": b'{"newer": 1}', "model.safetensors": DATA[::-1]}
    hub.add("owner/name", newer)
    folder = Repository.parse("owner/name").fetch(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == newer


def test_weights_in_shards_and_pickles_are_found(hub, tmp_path):
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    files = {
        **SMALL,
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "pytorch_model-1.bin": DATA,
        "pytorch_model-2.bin": b"b",
    }
    hub.add("owner/shards", files)
    folder = Repository.parse("owner/shards@main").fetch(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    del files["pytorch_model-2.bin"]
    hub.add("owner/lacks", files)
    with pytest.raises(InputError, match=r"the shard pytorch_model-2\.bin, which .* lists, is not in it"):
        Repository.parse("owner/lacks").fetch(tmp_path / "2")
    files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": {"a": "../../evil"}}).encode()
    hub.add("owner/evil", files)
    with pytest.raises(InputError, match=r"'\.\./\.\./evil' is no name of a shard"):
        Repository.parse("owner/evil").fetch(tmp_path / "3")


def test_bytes_that_are_not_those_of_the_hub_s_digest_are_refused(hub, tmp_path):
    hub.add("owner/name", {**SMALL, "model.safetensors": DATA})
    hub.wrong_bytes = True
    with pytest.raises(RunError, match="its SHA256 begins with"):
        Repository.parse("owner/name").fetch(tmp_path)


def test_what_a_hub_refuses_is_told_apart(hub, tmp_path, monkeypatch):
    def refused(text, *expected):
        with pytest.raises(InputError) as caught:
            Repository.parse(text).fetch(tmp_path)
        assert all(part in str(caught.value) for part in expected), caught.value

    refused(
        "owner/none", "hf:owner/none@main: no such repository that is public", "HF_TOKEN opens private ones"
    )
    hub.add("owner/name", {**SMALL, "model.safetensors": DATA})
    refused("owner/name@v2", "no revision 'v2'")
    hub.add("owner/other", {"README.md": b"text"})
    refused("owner/other", "no config.json in it")
    hub.add("owner/empty", SMALL)
    refused("owner/empty", "neither model.safetensors nor pytorch_model.bin")
    hub.add("owner/gated", {**SMALL, "model.safetensors": DATA})
    hub.gated["owner/gated"] = "secret"
    refused("owner/gated", f"accepted at {hub.url}/owner/gated", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "secret\n")  # as files and cluster secrets end
    hub.requests.clear()
    Repository.parse("owner/gated").fetch(tmp_path)
    sent = {(path.split("/")[1], token) for path, _, token in hub.requests}
    assert sent == {("owner", "Bearer secret"), ("store", None)}  # the store gets no token
    monkeypatch.setenv("HF_TOKEN", "geheim\u00fc")
    refused("owner/gated@v3", "HF_TOKEN: is no token")
    for wrong in ("name", "owner/name/file", "owner/name@", "owner/na me"):
        with pytest.raises(InputError, match="hf:OWNER/NAME or hf:OWNER/NAME@REVISION is expected"):
            Repository.parse(wrong)
