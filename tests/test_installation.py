"""What the runtime finds on a machine: whichever ONNX Runtime there is, without its telemetry; cores; the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from saferedir.engines import DEFAULT_BUNDLE, open_bundle, plan_cache
from saferedir.engines.errors import MissingDependencyError, PlanError, RequestError
from saferedir.engines.plan_cache import user_cache
from saferedir.runtime.backends import make_backend
from saferedir.runtime.installation import import_onnxruntime, installation_problem, installed_distributions
from saferedir.runtime.ort import OrtBackend
from saferedir.runtime.tensorrt import plan_folders
from saferedir.runtime.threads import VARIABLE, available_cores, cpu_quota, thread_count


class Installed(SimpleNamespace):
    """A distribution that provides the module of the same name without its ending."""

    def read_text(self, name: str) -> str | None:
        return self.provides if name == "top_level.txt" else None


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    provided = {name: "onnxruntime_genai\n" if "genai" in name else "onnxruntime\n" for name in names}
    found = [Installed(name=name, version="1.30", provides=text) for name, text in provided.items()]
    monkeypatch.setattr(metadata, "distributions", lambda: [*found, Installed(name="numpy", version="2", provides=None)])


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-openvino", "onnxruntime-directml", "ort-nightly-gpu"])
def test_any_distribution_that_provides_the_module_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, name, "onnxruntime-genai")
    assert installed_distributions() == {name: "1.30"}
    assert installation_problem() is None


def test_two_at_once_are_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "onnxruntime-openvino", "onnxruntime")
    with pytest.raises(MissingDependencyError, match="both onnxruntime and onnxruntime-openvino are installed"):
        import_onnxruntime()


def test_the_module_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As built from source, without a distribution's description."""
    install(monkeypatch)
    assert installation_problem() is None
    versions = OrtBackend(open_bundle(DEFAULT_BUNDLE), "ort-cpu").versions()
    assert versions == {"backend": "ort-cpu", "onnxruntime": import_onnxruntime().__version__}


def test_a_run_leaves_nothing_of_onnx_runtimes_own_behind(tmp_path: Path) -> None:
    code = (
        "from saferedir.runtime import Pipeline\n"
        "Pipeline.from_bundle()('a cat', num_inference_steps=4)\n"
        "import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    kept = {key: value for key, value in os.environ.items() if key not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    environment = {**kept, "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert run.stdout == "1\n", run.stderr
    assert list(tmp_path.rglob("*")) == []


def test_who_wants_telemetry_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    fake = SimpleNamespace(__spec__=SimpleNamespace(origin="here"), disable_telemetry_events=lambda: calls.append(True))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)  # type: ignore[arg-type]
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_onnxruntime()
    assert not calls
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    import_onnxruntime()
    assert calls


def group(root: Path, membership: str, **files: str) -> Path:
    """A file system whose control groups are these; `__` in a name stands for a slash, `_` after `cpu` for a point."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs_", "cpu.cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_quota_of_control_groups_bounds_the_threads(tmp_path: Path) -> None:
    half = group(tmp_path / "half", "0::/pod/box\n", pod__box__cpu_max="50000 100000\n", pod__cpu_max="max 100000\n")
    assert cpu_quota(half) == 0.5
    assert available_cores(half) == 1
    above = group(tmp_path / "above", "0::/pod/box\n", pod__box__cpu_max="max 100000\n", pod__cpu_max="150000 100000\n")
    assert cpu_quota(above) == 1.5
    first = group(
        tmp_path / "first",
        "5:cpuset:/a\n4:cpu,cpuacct:/docker/0123\n",
        **{"cpu,cpuacct__cfs_quota_us": "100000", "cpu,cpuacct__cfs_period_us": "50000"},
    )
    assert cpu_quota(first) == 2.0
    other = group(tmp_path / "other", "4:cpu:/a\n", cpu__a__cfs_quota_us="-1\n", cpu__a__cfs_period_us="100000\n")
    assert cpu_quota(other) == float("inf")
    assert cpu_quota(tmp_path / "none") == float("inf")
    assert available_cores(other) == len(os.sched_getaffinity(0))


def test_threads_are_what_is_asked_for_then_what_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert thread_count() == available_cores()
    monkeypatch.setenv(VARIABLE, "3")
    assert thread_count() == 3
    assert thread_count(2) == 2
    assert OrtBackend(open_bundle(DEFAULT_BUNDLE), "ort-cpu")._threads == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "1025", "9" * 5000, "٣x"])
def test_a_variable_that_is_no_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(RequestError, match=r"SAFEREDIR_THREADS is .*expected a whole number of 1 to 1024"):
        thread_count()


@pytest.mark.parametrize("threads", [0, -1, 2.0, True, "2", 1025])
def test_an_impossible_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(RequestError, match="threads is"):
        make_backend(open_bundle(DEFAULT_BUNDLE), "ort-cpu", threads=threads)


def test_threads_for_a_backend_that_takes_none_are_refused() -> None:
    with pytest.raises(RequestError, match="threads is 2, of which backend 'torch' makes no use"):
        make_backend(open_bundle(DEFAULT_BUNDLE), "torch", threads=2)


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> Path:
        raise RuntimeError("could not determine the home directory")

    for answer in (unknown, lambda *_, **__: Path("~/.cache")):
        monkeypatch.setattr(plan_cache, "user_cache_path", answer)
        with pytest.raises(PlanError, match="no home folder to keep plans in; set XDG_CACHE_HOME"):
            user_cache()
        bundle = open_bundle(DEFAULT_BUNDLE)
        assert plan_folders(bundle) == [bundle.folder / "plans"]


def test_the_users_cache_is_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "saferedir" / "plans"
