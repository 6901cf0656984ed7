"""The comparison of two runs of a test suite."""

from peft_suite import results


def test_a_test_that_passes_on_stock_models_alone_is_one_that_fails(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<suite><testcase classname="C" name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase></suite>'
    )
    assert results(report) == {"C::a": True, "b": False}
