"""The header that is compiled once for all programs: that it is used, and when it is not."""

import subprocess

import pytest

from inference.engine.compiler import cpp_build, inductor

SMALL = "#include <cstddef>\n"  # stands for Inductor's, which takes seconds
PROGRAM = 'extern "C" std::size_t one() { return 1; }'  # compiles with that header alone


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpp_build, "_TEXT", SMALL)
    return tmp_path / "kiln" / "headers"


@pytest.fixture
def commands(monkeypatch):
    """The compilers that were run, not those asked for their version."""
    seen = []
    run = subprocess.run

    def noted(command, **options):
        if "-o" in command:
            seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", noted)
    return seen


def header():
    with cpp_build.precompiled() as ready:
        return ready()


def build(folder, header):
    source = folder / "step.cpp"
    source.write_text(PROGRAM)
    cpp_build.build(source, folder / "step.so", header)
    assert (folder / "step.so").exists()


def test_the_real_header_serves_a_program(headers_kept, tmp_path, commands):
    """The text beside what was compiled would be an error: it is not read."""
    twin = tmp_path / headers_kept.name
    twin.write_text("#error this is the text")
    compiled = next(headers_kept.parent.glob(f"{twin.name}.*"))
    (tmp_path / compiled.name).hardlink_to(compiled)
    build(tmp_path, twin)
    assert len(commands) == 1


def test_it_is_compiled_once_beside_the_body(cache, commands):
    with cpp_build.precompiled() as ready:
        assert ready() == next(cache.iterdir()) / "prefix.h"
    assert header() == ready()
    assert len(commands) == 1
    assert sorted(path.name for path in ready().parent.iterdir()) == ["prefix.h", "prefix.h.gch", "sha256"]


@pytest.mark.parametrize("harm", ["content", "digest", "text", "half", "writable", "link"])
def test_a_spoiled_header_is_not_used_but_compiled_again(cache, commands, harm, tmp_path):
    found = header()
    compiled, digest = found.with_name("prefix.h.gch"), found.with_name("sha256")
    if harm == "content":
        compiled.write_bytes(compiled.read_bytes()[:-1] + b"x")
    elif harm == "digest":
        digest.unlink()
    elif harm == "text":
        found.write_text("#define one two\n")
    elif harm == "half":
        compiled.unlink()
    elif harm == "writable":
        compiled.chmod(0o666)
    else:
        compiled.rename(tmp_path / "elsewhere")
        compiled.symlink_to(tmp_path / "elsewhere")
    assert header() == found
    assert len(commands) == 2
    assert found.read_text() == SMALL
    assert header() == found
    assert len(commands) == 2


def test_without_a_folder_of_the_users_own_there_is_none(cache, commands):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert header() is None
    cache.chmod(0o700)
    header().parent.chmod(0o777)
    assert header() is None
    assert len(commands) == 1


def test_a_header_that_does_not_compile_is_none(cache, monkeypatch):
    monkeypatch.setattr(cpp_build, "_TEXT", "#error no\n")
    assert header() is None
    assert [path.name for path in next(cache.iterdir()).iterdir()] == ["prefix.h"]


@pytest.mark.parametrize("harm", ["gone", "nonsense"])
def test_a_program_is_compiled_without_a_header_that_the_compiler_refuses(tmp_path, harm, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PROGRAM", 'extern "C" int one() { return 1; }')
    spoiled = tmp_path / "prefix.h"
    if harm == "nonsense":
        spoiled.write_text("#error no\n")
        (tmp_path / "prefix.h.gch").write_text("nonsense")
    build(tmp_path, spoiled)


def test_a_body_that_fails_leaves_the_header(cache, commands):
    with pytest.raises(ValueError, match="the body"), cpp_build.precompiled():
        raise ValueError("the body")
    assert header() is not None
    assert len(commands) == 1


def test_another_compiler_or_text_is_another_header_and_old_ones_make_room(cache, monkeypatch):
    found = {header()}
    monkeypatch.setattr(inductor, "machine", lambda: "another")
    found.add(header())
    monkeypatch.setattr(cpp_build, "_TEXT", "#include <cstdint>\n")
    found.add(header())
    assert len(found) == 3
    assert len(list(cache.iterdir())) == 2
