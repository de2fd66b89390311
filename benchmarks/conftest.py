"""Options of the benchmarks' own pytest run."""


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="every case of the suite in place of the quick ones")


def pytest_generate_tests(metafunc):
    if {"op", "case", "provider"} <= set(metafunc.fixturenames):
        from benchmarks.test_ops import chosen

        metafunc.parametrize(("op", "case", "provider"), chosen(metafunc.config.getoption("--all-cases")))
