"""What others made is data: pictures, captions, tables, caches and settings; see test_malice for models."""

import io
import json
import pickle
import tarfile
import zipfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from benchmarks.faults.malicious import (
    CODE,
    DEEP,
    FORMS,
    OBJECTS,
    PIPE,
    assert_refused,
    message_of,
    payload,
    spoil,
)
from lora_utils import stages
from lora_utils.cli import main
from lora_utils.config.loading import load_config
from lora_utils.data.sources.tables import read_member
from lora_utils.memory.footprint import Footprint, cached_on_disk
from lora_utils.memory.operators import Work
from lora_utils.precompute.cache import Cache
from lora_utils.precompute.examples import INDEX_NAME, IndexFileError, read_index
from tests.storage.malicious_checkpoints import PACKS

PACK = "images-000001-0123abcd.safetensors"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile\n"
PASSED_OVER = {
    "a script of the folder's name": {"pictures.py": CODE, "__init__.py": CODE, "conftest.py": CODE},
    "the user's modules by name": {"payload_module.py": CODE, "sitecustomize.py": CODE},
    **{f"pictures ({form})": {"x.png": form, "y.jpg": form, "z.webp": form} for form in (*FORMS, OBJECTS)},
    "a picture that is a program": {"x.png": POSTSCRIPT},
    "pickles between": {
        "x.pkl": "pickle",
        "x.pt": "torch.save",
        "x.npy": OBJECTS,
        "dataset_info.json": "pickle",
    },
    "pipes": {"x.png": PIPE, "00000.txt": PIPE, "x.txt": PIPE},
}
REFUSED = {
    **{
        f"a table ({name}, {form})": {name: form}
        for name in ("a.parquet", "a.arrow", "a.csv")
        for form in FORMS
    },
    "a table of lines": {"a.jsonl": "pickle"},
    "a script": {"tables.py": CODE},
    "a script and its settings": {"tables.py": CODE, "README.md": b"---\nconfigs: tables.py\n---\n"},
    "settings with tags": {
        "README.md": b"---\nconfigs: !!python/object/apply:os.system ['touch canary']\n---\n"
    },
    "a state": {"state.json": "pickle", "dataset_info.json": "pickle"},
    "a deep state": {"state.json": DEEP.encode(), "dataset_info.json": DEEP.encode()},
    "states": {"dataset_dict.json": "pickle"},
    "a state that is a list": {"state.json": b"[]", "dataset_info.json": b"[]"},
    "rows elsewhere": {
        "state.json": b'{"_data_files": [{"filename": "../x"}], "_split": "train"}',
        "x": "pickle",
    },
    "rows that are a pickle": {
        "state.json": b'{"_data_files": [{"filename": "x"}], "_split": "train", "_fingerprint": "a"}',
        "dataset_info.json": b"{}",
        "x": "pickle",
    },
    "an array": {"a.npy": OBJECTS},
}
TAGS = [
    "!!python/object/apply:builtins.exec [{!r}]",
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:builtins.exec [{!r}]",
    "!!python/name:os.system",
    "!!python/module:payload_module",
    "!!python/object:payload_module.P {{}}",
    "!<tag:yaml.org,2002:python/object/apply:builtins.exec> [{!r}]",
]


@pytest.fixture
def canary(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "the payload ran"


def test_there_are_many_payloads():
    changes = [*PASSED_OVER.values(), *REFUSED.values()]
    assert (
        sum(str(content) in {CODE, OBJECTS, *FORMS} for files in changes for content in files.values())
        + len(TAGS)
        >= 40
    )


@pytest.mark.parametrize("changes", PASSED_OVER.values(), ids=PASSED_OVER)
def test_nothing_in_a_folder_of_pictures_runs(make_config, pictures, canary, changes):
    spoil(pictures, changes, canary)
    config = make_config(train_data_dir=pictures)
    found = stages.precompute(config)
    assert len(found.entries) >= 9
    images = {name for name in changes if name.endswith((".png", ".jpg", ".webp"))}
    assert not images & {entry.source for entry in found.entries}
    assert images <= {finding.source for finding in found.findings}
    assert message_of(lambda: stages.check_data(config)) == ""


def test_a_folder_of_payloads_alone_is_refused(make_config, tmp_path, canary):
    spoil(tmp_path / "pictures", {"x.png": "pickle", "x.txt": "pickle"}, canary)
    config = make_config(train_data_dir=tmp_path / "pictures")
    assert_refused(lambda: stages.precompute(config), "x.txt", "left out; save x.txt as UTF-8")


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_nothing_in_a_folder_of_tables_runs(make_config, tmp_path, canary, changes):
    spoil(tmp_path / "tables", changes, canary)
    config = make_config(train_data_dir=None, dataset_name=str(tmp_path / "tables"))
    assert_refused(lambda: stages.precompute(config), tmp_path / "tables", "; ")


@pytest.mark.parametrize(
    "name", ["a.pkl", "a.pt", "a.npy", "a.bin", "a.parquet", "a.arrow", "a.zip", "a.tar"]
)
def test_no_file_that_is_named_as_a_dataset_runs(make_config, tmp_path, canary, name):
    spoil(tmp_path, {name: "pickle"}, canary)
    config = make_config(train_data_dir=None, dataset_name=str(tmp_path / name))
    assert_refused(lambda: stages.precompute(config), name, "; ")


def test_a_type_of_its_own_in_a_table_is_not_made(make_config, tmp_path, canary):
    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload(canary)}
    schema = pa.schema([pa.field("image", pa.binary(), metadata=told), pa.field("text", pa.string())])
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array(["a"])], schema=schema)
    for name in ("tables/a.parquet", "pictures/metadata.parquet"):
        (tmp_path / name).parent.mkdir()
        parquet.write_table(table, tmp_path / name)
    config = make_config(train_data_dir=None, dataset_name=str(tmp_path / "tables"))
    assert_refused(lambda: stages.precompute(config))
    assert_refused(lambda: stages.precompute(make_config(train_data_dir=tmp_path / "pictures")))


def test_a_table_of_broken_text_is_refused_by_name(make_config, tmp_path, pictures):
    text = pa.array([b"\xff\xfe", b"a"]).view(pa.binary())
    broken = pa.StringArray.from_buffers(2, text.buffers()[1], text.buffers()[2])
    parquet.write_table(pa.table({"file_name": broken, "text": broken}), pictures / "metadata.parquet")
    assert_refused(lambda: stages.precompute(make_config(train_data_dir=pictures)), "metadata.parquet", "; ")
    (tmp_path / "tables").mkdir()
    parquet.write_table(pa.table({"image": [b"x", b"y"], "text": broken}), tmp_path / "tables" / "a.parquet")
    config = make_config(train_data_dir=None, dataset_name=str(tmp_path / "tables"))
    assert_refused(lambda: stages.precompute(config), "column text", "; ")


def test_pickles_in_a_tape_archive_are_not_opened(make_config, tmp_path, canary):
    (tmp_path / "tables").mkdir()
    with tarfile.open(tmp_path / "tables" / "a.tar", "w") as file:
        for number in range(3):
            for ending in ("pkl", "pickle", "pyd", "pth", "npy", "../../../escaped"):
                content = payload(canary, "torch.save" if ending == "pth" else "pickle")
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    config = make_config(train_data_dir=None, dataset_name=str(tmp_path / "tables"))
    assert_refused(lambda: stages.precompute(config), "tables")
    assert not list(tmp_path.rglob("*escaped*"))


def test_a_bomb_in_an_archive_is_not_unpacked(make_config, tmp_path, canary):
    archive = tmp_path / "tables" / "images.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("bomb.png", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(2**20))
        file.writestr("../../escaped.png", payload(canary))
    (tmp_path / "tables" / "a.csv").write_text(f"image,text\nzip://bomb.png::{archive},a\n")
    config = make_config(train_data_dir=None, dataset_name=str(tmp_path / "tables"))
    assert_refused(lambda: stages.precompute(config), archive, "would be 300 MiB", "; ")
    assert_refused(lambda: read_member(archive, "bomb.png"), "larger than 256 MiB; ")
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("compression", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_archive_that_is_damaged_inside_is_refused_by_name(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as file:
        file.writestr("x.png", bytes(1000))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[40:60] = bytes(20)
    (tmp_path / "a.zip").write_bytes(content)
    assert_refused(lambda: read_member(tmp_path / "a.zip", "x.png"), "a.zip")


@pytest.mark.parametrize("content", PACKS.values(), ids=PACKS)
def test_a_pack_of_the_cache_that_lies_is_set_aside_by_name(tmp_path, canary, content):
    spoil(tmp_path / "cache", {PACK: content}, canary)
    caches = []
    assert message_of(lambda: caches.append(Cache(tmp_path / "cache"))) == ""
    assert len(caches[0]) == 0
    assert [(finding.source, finding.kind) for finding in caches[0].findings] == [(PACK, "fixed")]
    [bad] = (tmp_path / "cache").iterdir()
    assert bad.name.startswith(f".bad-{PACK}-")


@pytest.mark.parametrize("content", [*FORMS, DEEP.encode(), b'{"schema": 2, "examples": 1}\n[', PIPE])
def test_an_index_is_written_anew_and_never_trusted(make_config, tmp_path, canary, content):
    spoil(tmp_path / "cache", {INDEX_NAME: content, PACK: "pickle"}, canary)
    with pytest.raises(IndexFileError):
        read_index(tmp_path / "cache")
    found = stages.precompute(make_config(precompute_dir=tmp_path / "cache"))
    assert [entry.source for entry in read_index(tmp_path / "cache")] == [
        entry.source for entry in found.entries
    ]


@pytest.mark.parametrize(
    "content", ["pickle", "torch.save", DEEP.encode(), b'{"peak_bytes": NaN}', b"[]", b'"x"']
)
def test_what_was_remembered_is_counted_anew_when_it_is_something_else(tmp_path, canary, content):
    def counted():
        return Footprint(1, 2, 3, {}, {}, Work(1, {}, 1), Work(1, {}, 1))

    assert cached_on_disk(counted, folder=tmp_path) == counted()
    [file] = (tmp_path / "forecasts").iterdir()
    spoil(file.parent, {file.name: content}, canary)
    assert cached_on_disk(counted, folder=tmp_path) == counted()
    assert json.loads(file.read_text())["peak_bytes"] == 1


@pytest.mark.parametrize("tag", TAGS)
def test_no_tag_in_a_file_of_settings_runs(tmp_path, canary, capsys, tag):
    spoil(tmp_path, {"payload_module.py": CODE}, canary)
    code = f"open({str(canary)!r}, 'w')"
    (tmp_path / "run.yaml").write_text("rank: " + tag.format(code if "exec" in tag else canary))
    assert_refused(lambda: load_config(tmp_path / "run.yaml"), "run.yaml", "line 1", "tag")
    assert main(["check", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    (tmp_path / "run.yaml").write_bytes(pickle.dumps({"rank": 4}))
    assert_refused(lambda: load_config(tmp_path / "run.yaml"), "run.yaml")
