from apt_ray.tables import align, markdown


def test_columns_have_one_width_and_no_blanks_at_the_end() -> None:
    assert align([("name", "value"), ("a", "1")]) == "name  value\na     1"


def test_a_cell_cannot_break_a_markdown_table() -> None:
    assert markdown(("what", "why"), [("a|b", "one\ntwo")]) == (
        "| what | why |\n|---|---|\n| a\\|b | one two |"
    )
