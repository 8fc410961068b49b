"""Templates: clauses that go with their fields, the templates of the public datasets, further tables of items."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generative_recommenders.data.errors import DataError
from generative_recommenders.data.item_tables import with_item_table
from generative_recommenders.data.text_templates import MOVIES, PRODUCTS, item_texts, template_of, text_columns

STRINGS = pa.list_(pa.string())


def products() -> pa.Table:
    return pa.table(
        {
            "item_id": [1, 2, 3, 4, 5],
            "raw_id": ["a", "b", "c", "d", "e"],
            "title": pa.array(["Soap 6 oz.", None, " ", "Comb\n  set", None], pa.string()),
            "brand": pa.array(["Acme", "Acme", None, None, None], pa.string()),
            "categories": pa.array([["Beauty", "Bath"], [], ["Hair", None, " "], None, []], STRINGS),
            "textual_id": pa.array([None, "red ball", None, "comb", None], pa.string()),
            "price": pa.array([1.5, None, 2.0, None, None]),
        }
    )


def test_a_clause_goes_where_a_field_is_missing() -> None:
    assert item_texts(products(), PRODUCTS) == [
        "Soap 6 oz.. Brand: Acme. Categories: Beauty > Bath",
        "red ball. Brand: Acme",
        "Categories: Hair",
        "Comb set",
        "",
    ]


def test_signs_labels_and_numbers() -> None:
    texts = item_texts(products(), "Item: {title}; Price: {price} by {brand}\n{categories:/}; End")
    assert texts == [
        "Item: Soap 6 oz.; Price: 1.5 by Acme\nBeauty/Bath; End",
        "",
        "Hair; End",
        "Item: Comb set; End",
        "",
    ], "words alone make no text"


def test_a_joiner_may_look_like_the_end_of_a_clause() -> None:
    assert item_texts(products(), "{categories:. }. By {brand}")[0] == "Beauty. Bath. By Acme"


def test_movies() -> None:
    movies = pa.table(
        {"title": ["Heat (1995)", "Nameless"], "categories": pa.array([["Action", "Crime"], []], STRINGS)}
    )
    assert item_texts(movies, MOVIES) == ["Heat (1995). Genres: Action, Crime", "Nameless"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_kinds_of_text(kind: pa.DataType) -> None:
    table = pa.table({"title": pa.chunked_array([pa.array(["x", None]).cast(kind), pa.array(["y"]).cast(kind)])})
    assert item_texts(table, "Title: {title}") == ["Title: x", "", "Title: y"]


@given(
    st.lists(
        st.tuples(
            st.none() | st.text("ab .", max_size=4),
            st.none() | st.text("xy ;", max_size=4),
            st.none() | st.lists(st.none() | st.text("pq ", max_size=2), max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_equals_a_loop_over_the_rows(rows: list[tuple[str | None, str | None, list[str | None] | None]]) -> None:
    def clean(text: str | None) -> str | None:
        return " ".join(text.split()) or None if text is not None else None

    expected = []
    for title, brand, categories in rows:
        names = [name for name in map(clean, categories or []) if name]
        clauses = [
            clean(title),
            f"B: {clean(brand)}" if clean(brand) else None,
            f"C: {'>'.join(names)}" if names else None,
        ]
        expected.append(". ".join(clause for clause in clauses if clause))
    titles, brands, lists = zip(*rows, strict=True)
    table = pa.table(
        {
            "t": pa.array(titles, pa.string()),
            "b": pa.array(brands, pa.string()),
            "c": pa.array(lists, STRINGS),
        }
    )
    assert item_texts(table, "{t}. B: {b}. C: {c:>}") == expected


def test_templates_of_datasets() -> None:
    assert template_of("ml-1m", ["title", "text", "categories"]) == MOVIES
    assert template_of("amzn14-sports", ["categories", "brand", "textual_id"]) == PRODUCTS
    assert template_of("online-retail", ["stock_code", "description"]) == "{description}"
    assert template_of("online-retail", ["text"]) == "{text}", "its own cannot be filled"
    assert template_of("shop", ["title", "text"]) == "{text}"
    assert (
        template_of("shop", ["categories", "title", "made_in"])
        == "{title}. Categories: {categories}. Made in: {made_in}"
    )
    with pytest.raises(DataError, match="no column of texts"):
        template_of("shop", [])


def test_text_columns_leave_ids_and_numbers_out() -> None:
    assert text_columns(products()) == ["title", "brand", "categories", "textual_id"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no field", "expected a field such as"),
        ("{title} {", "braces in pairs"),
        ("{tilte}", "got the field 'tilte', expected one of item_id, raw_id, title, brand"),
        ("{title}. {tilte|name}", "got the field 'tilte.name'"),
    ],
)
def test_refused_templates(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        item_texts(products(), template, strict=True)
    assert "\n" not in str(caught.value)


def test_a_column_of_another_kind_is_refused() -> None:
    table = pa.table({"flag": [True]})
    with pytest.raises(DataError, match="column flag: got type bool"):
        item_texts(table, "{flag}")


def items() -> pa.Table:
    return pa.table({"item_id": [1, 2, 3], "raw_id": ["007", "12", "13"], "title": ["old", "old", "old"]})


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_item_table(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        path.write_text("item_id,title,description\n13,c,third\n007,a,first\n99,z,none\n")
    else:
        table = pa.table({"item_id": ["13", "007"], "title": ["c", "a"], "description": ["third", "first"]})
        pq.write_table(table, path)
    joined = with_item_table(items(), path)
    assert joined["item_id"].to_pylist() == [1, 2, 3]
    assert joined["description"].to_pylist() == ["first", None, "third"]
    assert joined["title"].to_pylist() == ["a", None, "c"]
    assert "1 of 3 items are not listed" in caplog.text


def test_integer_keys_of_an_item_table(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"item_id": pa.array([13, 12], pa.int32()), "description": ["c", "b"]}), path)
    assert with_item_table(items(), path)["description"].to_pylist() == [None, "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,x\n12,a\n12,b\n", "got item_id '12' empty or twice"),
        ("id,x\n12,a\n", "got the columns id, x, expected raw_id or item_id"),
        ("raw_id,x\n5,a\n", "lists none of the 3 items, such as '007'"),
        ("raw_id,x\n5,a,b\n", "cannot be read"),
    ],
)
def test_refused_item_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        with_item_table(items(), path)
    with pytest.raises(DataError, match=r"expected a \.parquet or \.csv"):
        with_item_table(items(), path.with_suffix(".txt"))
