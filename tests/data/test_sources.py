"""Every source against its published format, on real files where they are at hand, else on small ones of that shape."""

import dataclasses
import errno
import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from generative_recommenders.data import sources
from generative_recommenders.data.download import download
from generative_recommenders.data.errors import DataError
from generative_recommenders.data.preprocess import prepare
from generative_recommenders.data.raw_files import RawFiles
from generative_recommenders.data.sources import ml_100k


def test_registry_lists_every_source() -> None:
    assert sources.names() == [
        "amazon23-cell-phones",
        "amazon23-office-products",
        "amazon23-video-games",
        "amzn-books",
        "amzn14-beauty",
        "amzn14-sports",
        "amzn14-toys",
        "custom",
        "ml-100k",
        "ml-1m",
        "ml-20m",
        "online-retail",
        "synthetic",
    ]
    assert all(sources.get(name).name == name for name in sources.names())


def test_an_option_of_another_source_is_refused() -> None:
    with pytest.raises(DataError, match="--user_column: dataset 'ml-1m' does not use it"):
        sources.get("ml-1m").with_options(user_column="u")


@pytest.fixture(scope="module")
def folder(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared MovieLens 1M."""
    raw = shared_dir / "data" / "ml-1m" / "ml-1m.zip"
    return prepare(sources.get("ml-1m"), raw=raw, data_dir=tmp_path_factory.mktemp("data"), csv=True).path


class TestMovieLens1M:
    def test_published_counts(self, folder: Path) -> None:
        sequences = pq.read_table(folder / "sequences.parquet")
        items = pq.read_table(folder / "items.parquet")
        events = sequences["item_ids"].combine_chunks().flatten().to_numpy()
        assert sequences.num_rows == 6_040
        assert len(events) == 1_000_209
        assert len(np.unique(events)) == 3_706
        assert items.num_rows == 3_883
        assert items["item_id"].to_numpy().max() == 3_952

    def test_first_user_in_order_of_time_and_then_of_the_file(self, folder: Path) -> None:
        first = pq.read_table(folder / "sequences.parquet").slice(0, 1).to_pylist()[0]
        # 1270, 1721 and 1022 share a second; ratings.dat has them in this order.
        assert first["item_ids"][:5] == [3186, 1270, 1721, 1022, 2340]
        assert first["ratings"][:5] == [4.0, 5.0, 4.0, 5.0, 3.0]
        assert first["timestamps"][:5] == [978300019, 978300055, 978300055, 978300055, 978300103]
        assert len(first["item_ids"]) == 53

    def test_ratings_and_time_range(self, folder: Path) -> None:
        sequences = pq.read_table(folder / "sequences.parquet")
        ratings = sequences["ratings"].combine_chunks().flatten().to_numpy()
        times = sequences["timestamps"].combine_chunks().flatten().to_numpy()
        assert np.bincount(ratings.astype(int)).tolist() == [0, 56_174, 107_557, 261_197, 348_971, 226_310]
        assert (times.min(), times.max()) == (956703932, 1046454590)

    def test_titles_genres_and_text(self, folder: Path) -> None:
        items = pq.read_table(folder / "items.parquet")
        assert items.slice(0, 1).to_pylist() == [
            {
                "item_id": 1,
                "raw_id": "1",
                "title": "Toy Story (1995)",
                "text": "Toy Story (1995). Genres: Animation, Children's, Comedy.",
                "categories": ["Animation", "Children's", "Comedy"],
            }
        ]
        titles = dict(zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True))
        assert titles[73] == "Misérables, Les (1995)"
        assert titles[260] == "Star Wars: Episode IV - A New Hope (1977)"
        assert len({name for names in items["categories"].to_pylist() for name in names}) == 18

    def test_user_codes_count_from_zero_in_sorted_order(self, folder: Path) -> None:
        users = pq.read_table(folder / "sequences.parquet", columns=["sex", "age_group", "occupation", "zip_code"])
        distinct = {name: sorted(set(users[name].to_pylist())) for name in users.column_names}
        assert {name: len(values) for name, values in distinct.items()} == {
            "sex": 2,
            "age_group": 7,
            "occupation": 21,
            "zip_code": 3_439,
        }
        assert all(values == list(range(len(values))) for values in distinct.values())
        # User 1 is F, under 18, occupation 10.
        assert users.slice(0, 1).to_pylist()[0] | {"zip_code": 0} == {
            "sex": 0,
            "age_group": 0,
            "occupation": 10,
            "zip_code": 0,
        }

    def test_csv_has_the_published_columns(self, folder: Path) -> None:
        with (folder / "sasrec_format.csv").open() as file:
            header, first = next(file).strip(), next(file)
        assert header == (
            "index,user_id,sequence_item_ids,sequence_ratings,sequence_timestamps,sex,age_group,occupation,zip_code"
        )
        assert first.startswith('0,1,"3186,1270,1721,')
        assert ',"4,5,4,5,3,' in first


class TestMovieLens100K:
    def test_published_counts(self, shared_dir: Path, tmp_path: Path) -> None:
        raw = shared_dir / "data" / "ml-100k" / "ml-100k.zip"
        done = prepare(sources.get("ml-100k"), raw=raw, data_dir=tmp_path)
        assert done.metadata["counts"] == {
            "users": 943,
            "items_listed": 1_682,
            "items_rated": 1_682,
            "events": 100_000,
            "users_with_fewer_than_3_events": 0,
        }
        items = pq.read_table(done.path / "items.parquet").slice(0, 1).to_pylist()[0]
        assert items["title"] == "Toy Story (1995)"
        assert items["categories"] == ["Animation", "Children's", "Comedy"]
        users = pq.read_table(done.path / "sequences.parquet", columns=["age", "sex", "occupation"])
        assert users.slice(0, 1).to_pylist() == [{"age": 24, "sex": 1, "occupation": 19}]

    def test_wheel_is_the_mirror_of_the_public_site(
        self, shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A wheel built here of the real files, its columns renamed as in the mirror, gives the same prepared data."""
        raw = RawFiles(shared_dir / "data" / "ml-100k" / "ml-100k.zip")
        wheel = tmp_path / "mirror.whl"
        _write_wheel(wheel, raw)

        def pip(command: list[str], **_: object) -> None:
            assert command[-1] == "recbole==1.2.1"
            wheel.rename(Path(command[command.index("--dest") + 1]) / "recbole-1.2.1-py3-none-any.whl")

        def unreachable(*_: object, **__: object) -> None:
            raise DataError("host not found")

        monkeypatch.setattr(ml_100k.subprocess, "run", pip)
        monkeypatch.setattr(ml_100k, "download", unreachable)
        mirrored = prepare(sources.get("ml-100k"), data_dir=tmp_path / "mirrored").path
        direct = prepare(sources.get("ml-100k"), raw=raw.path, data_dir=tmp_path / "direct").path
        for file in ("sequences.parquet", "items.parquet"):
            assert pq.read_table(mirrored / file).equals(pq.read_table(direct / file))

    def test_without_site_and_wheel_the_error_names_both(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing_pip(command: list[str], **_: object) -> None:
            raise ml_100k.subprocess.CalledProcessError(1, command, stderr="ERROR: No matching distribution found")

        def unreachable(*_: object, **__: object) -> None:
            raise DataError("host not found")

        monkeypatch.setattr(ml_100k.subprocess, "run", failing_pip)
        monkeypatch.setattr(ml_100k, "download", unreachable)
        with pytest.raises(DataError, match=r"host not found.*recbole==1\.2\.1: ERROR: No matching distribution"):
            sources.get("ml-100k").fetch(tmp_path)
        assert list(tmp_path.iterdir()) == []


def _write_wheel(path: Path, raw: RawFiles) -> None:
    rows = [line.split("|") for line in raw.read("u.item").to_pybytes().decode("latin-1").splitlines()]
    lines = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    for row in rows:
        genres = " ".join(name for name, flag in zip(ml_100k._GENRES, row[5:], strict=True) if flag == "1")
        title, _, year = row[1].strip().removesuffix(")").rpartition(" (")
        lines.append("\t".join([row[0], title or "unkonwn", year if title else "unkonwn", genres]))
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}.inter", b"header\n" + raw.read("u.data").to_pybytes())
        archive.writestr(f"{folder}.user", b"header\n" + raw.read("u.user").to_pybytes().replace(b"|", b"\t"))
        archive.writestr(f"{folder}.item", "\n".join(lines) + "\n")


class TestMovieLens20M:
    def test_csv_with_quotes_half_stars_and_unrated_movies(self, tmp_path: Path) -> None:
        raw = tmp_path / "ml-20m"
        raw.mkdir()
        (raw / "ratings.csv").write_text(
            "userId,movieId,rating,timestamp\n2,7,3.5,30\n2,9,4.0,10\n2,7,0.5,10\n1,9,5.0,1\n"
        )
        (raw / "movies.csv").write_text(
            'movieId,title,genres\n7,"City, The (1995)",Drama|War\n'
            '9,"Amélie ""A"" (2001)",(no genres listed)\n8,Z,IMAX\n',
            encoding="utf-8",
        )
        source = dataclasses.replace(sources.get("ml-20m"), expected_counts={})
        done = prepare(source, raw=tmp_path, data_dir=tmp_path / "out", csv=True)
        assert pq.read_table(done.path / "sequences.parquet").to_pylist() == [
            {"user_id": 1, "item_ids": [9], "ratings": [5.0], "timestamps": [1]},
            {"user_id": 2, "item_ids": [9, 7, 7], "ratings": [4.0, 0.5, 3.5], "timestamps": [10, 10, 30]},
        ]
        items = pq.read_table(done.path / "items.parquet").to_pylist()
        assert [item["item_id"] for item in items] == [7, 8, 9]
        assert items[0]["text"] == "City, The (1995). Genres: Drama, War."
        assert items[2] | {"raw_id": ""} == {
            "item_id": 9,
            "raw_id": "",
            "title": 'Amélie "A" (2001)',
            "text": 'Amélie "A" (2001).',
            "categories": [],
        }
        assert done.metadata["counts"]["users_with_fewer_than_3_events"] == 1
        assert '1,2,"9,7,7","4,0.5,3.5","10,10,30"' in (done.path / "sasrec_format.csv").read_text()

    def test_wrong_counts_are_named_with_the_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,7,3,1\n1,7,3,2\n1,7,3,3\n")
        (tmp_path / "movies.csv").write_text("movieId,title,genres\n7,T,Drama\n")
        with pytest.raises(DataError, match="users 1 instead of 138,493, items_rated 1 instead of 26,744"):
            prepare(sources.get("ml-20m"), raw=tmp_path, data_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_amazon_books_follows_the_published_filter(tmp_path: Path) -> None:
    """Against a plain transcription of the fact sheet's steps, on rows in which every step removes something."""
    rng = np.random.default_rng(3)
    rows = [
        (f"U{rng.integers(60):02d}", f"{rng.integers(40) ** 2 // 40:010d}", int(rng.integers(1, 6)), 86_400 * int(day))
        for day in rng.integers(1, 9, 330)
    ]
    raw = tmp_path / "books.csv"
    raw.write_text("".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in rows))
    users_of = [row[0] for row in rows]
    items_of = [row[1] for row in rows]
    kept = [row for row in rows if users_of.count(row[0]) >= 5 and items_of.count(row[1]) >= 5]
    catalogue = sorted({row[1] for row in kept})
    expected = {}
    for user in sorted({row[0] for row in kept}):
        mine = sorted((row for row in kept if row[0] == user), key=lambda row: row[3])
        if len(mine) >= 5:
            expected[user] = [catalogue.index(row[1]) + 1 for row in mine]
    assert 0 < len(expected) < len({row[0] for row in kept}) < 60, "every step must remove something"

    source = dataclasses.replace(sources.get("amzn-books"), expected_counts={})
    done = prepare(source, raw=raw, data_dir=tmp_path / "out", csv=True)
    sequences = pq.read_table(done.path / "sequences.parquet")
    assert dict(zip(sequences["raw_user_id"].to_pylist(), sequences["item_ids"].to_pylist(), strict=True)) == expected
    assert pq.read_table(done.path / "items.parquet")["raw_id"].to_pylist() == catalogue
    first = (done.path / "sasrec_format.csv").read_text().splitlines()[1]
    zero_based = ",".join(str(item - 1) for item in sequences["item_ids"][0].as_py())
    assert first.startswith(f'0,{sequences["user_id"][0].as_py() - 1},"{zero_based}"')


class TestCustom:
    HEADER = "user_id,item_id,timestamp,rating\n"

    def prepare(self, tmp_path: Path, text: str, **options: object) -> tuple[list[dict], list[dict]]:
        raw = tmp_path / "events.csv"
        raw.write_text(text)
        done = prepare(sources.get("custom").with_options(**options), raw=raw, data_dir=tmp_path, force=True)
        return (
            pq.read_table(done.path / "sequences.parquet").to_pylist(),
            pq.read_table(done.path / "items.parquet").to_pylist(),
        )

    def test_integer_ids_sort_as_numbers_and_survive(self, tmp_path: Path) -> None:
        users, items = self.prepare(tmp_path, self.HEADER + "20,10,3,1\n20,9,2,2\n20,100,2,3\n3,9,1,5\n")
        assert [item["raw_id"] for item in items] == ["9", "10", "100"]
        assert [(user["user_id"], user["raw_user_id"]) for user in users] == [(1, "3"), (2, "20")]
        assert users[1]["item_ids"] == [1, 3, 2]
        assert users[1]["ratings"] == [2.0, 3.0, 1.0]

    def test_text_ids_sort_as_text(self, tmp_path: Path) -> None:
        _, items = self.prepare(tmp_path, "user_id,item_id,timestamp\nu,b,1\nu,a10,2\nu,a9,3\n")
        assert [item["raw_id"] for item in items] == ["a10", "a9", "b"]

    def test_leading_zeros_make_text(self, tmp_path: Path) -> None:
        _, items = self.prepare(tmp_path, "user_id,item_id,timestamp\nu,007,1\nu,7,2\nu,8,3\nu,B1,4\n")
        assert [item["raw_id"] for item in items] == ["007", "7", "8", "B1"]

    def test_ids_above_the_precision_of_a_float(self, tmp_path: Path) -> None:
        big = 2**53
        _, items = self.prepare(tmp_path, f"user_id,item_id,timestamp\nu,{big + 1},1\nu,{big},2\nu,{big + 2},3\n")
        assert [item["raw_id"] for item in items] == [str(big), str(big + 1), str(big + 2)]

    def test_named_columns_without_ratings(self, tmp_path: Path) -> None:
        text = "who,what,when,rating\na,1,5,x\na,2,4,x\na,3,6,x\n".replace("rating", "note")
        users, _ = self.prepare(tmp_path, text, user_column="who", item_column="what", timestamp_column="when")
        assert users[0]["item_ids"] == [2, 1, 3]
        assert users[0]["ratings"] == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize(
        "times",
        [
            ("1388534401", "1388534400", "1388620800"),
            ("1388534401.75", "1388534400.0", "1388620800.5"),
            ("2014-01-01 00:00:01", "2014-01-01 00:00:00", "2014-01-02 00:00:00"),
            ("2014-01-01T00:00:01Z", "2014-01-01T01:00:00+01:00", "2014-01-02"),
        ],
    )
    def test_times_become_whole_seconds(self, tmp_path: Path, times: tuple[str, str, str]) -> None:
        rows = "".join(f"u,{item},{time}\n" for item, time in enumerate(times))
        users, _ = self.prepare(tmp_path, "user_id,item_id,timestamp\n" + rows)
        assert users[0]["timestamps"] == [1388534400, 1388534401, 1388620800]
        assert users[0]["item_ids"] == [2, 1, 3]

    def test_order_inside_a_second_is_kept(self, tmp_path: Path) -> None:
        users, _ = self.prepare(tmp_path, "user_id,item_id,timestamp\nu,1,1.5\nu,2,1.25\nu,3,0.75\n")
        assert users[0]["item_ids"] == [3, 2, 1]
        assert users[0]["timestamps"] == [0, 1, 1]

    @pytest.mark.parametrize(
        "times",
        [
            pa.array([2**62 - 1, -(2**62) + 1, 0]),
            # In microseconds these would not fit int64.
            pa.array([2**50, -(2**50), 0], pa.timestamp("s")),
            pa.array([2**31 - 1, -(2**31), 0], pa.date32()),
        ],
    )
    def test_times_far_away_are_kept(self, tmp_path: Path, times: pa.Array) -> None:
        table = pa.table({"user_id": [1, 1, 1], "item_id": [1, 2, 3], "timestamp": times})
        pq.write_table(table, tmp_path / "events.parquet")
        done = prepare(sources.get("custom"), raw=tmp_path / "events.parquet", data_dir=tmp_path)
        user = pq.read_table(done.path / "sequences.parquet").to_pylist()[0]
        day = 86_400 if pa.types.is_date(times.type) else 1
        numbers = times.cast(pa.int32()).to_pylist() if day > 1 else times.cast(pa.int64()).to_pylist()
        assert user["timestamps"] == sorted(number * day for number in numbers)
        assert user["item_ids"] == [2, 3, 1]

    def test_parquet_and_gzip_equal_csv(self, tmp_path: Path) -> None:
        text = self.HEADER + "b,10,3,1\nb,9,2,2\nb,7,2,3\na,7,1,5\n"
        expected = self.prepare(tmp_path, text)
        table = pa.table(
            {
                "rating": pa.array([1, 2, 3, 5], pa.int8()),
                "user_id": ["b", "b", "b", "a"],
                "item_id": pa.array([10, 9, 7, 7], pa.int32()),
                "timestamp": pa.array([3000, 2000, 2000, 1000], pa.timestamp("ms")),
            }
        )
        pq.write_table(table, tmp_path / "events.parquet")
        with pa.CompressedOutputStream(str(tmp_path / "events.csv.gz"), "gzip") as file:
            file.write(text.encode())
        for name in ("events.parquet", "events.csv.gz"):
            done = prepare(sources.get("custom"), raw=tmp_path / name, data_dir=tmp_path / name.replace(".", "-"))
            assert pq.read_table(done.path / "sequences.parquet").to_pylist() == expected[0]
            assert pq.read_table(done.path / "items.parquet").to_pylist() == expected[1]

    def test_item_table_adds_titles_and_unrated_items(self, tmp_path: Path) -> None:
        table = tmp_path / "items.csv"
        table.write_text("item_id,name,categories\n8,Eight,x|y\n7,Seven,z\n")
        options = {"items": table, "title_column": "name"}
        users, items = self.prepare(tmp_path, self.HEADER + "a,10,3,1\na,9,2,2\na,7,1,3\n", **options)
        assert [(item["raw_id"], item["title"], item["categories"]) for item in items] == [
            ("7", "Seven", ["z"]),
            ("8", "Eight", ["x", "y"]),
            ("9", None, None),
            ("10", None, None),
        ]
        assert items[1]["text"] == "Eight. Categories: x, y."
        assert users[0]["item_ids"] == [1, 3, 4]


class _FlakyHandler(http.server.BaseHTTPRequestHandler):
    """Serves `content`; closes the first `cuts` connections half way; honors Range unless told otherwise."""

    content = b""
    cuts = 0
    ranges = True
    seen: list[str | None]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).seen.append(wanted)
        if self.path != "/file.bin":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).cuts > 0:
            type(self).cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


class TestDownload:
    @pytest.fixture
    def handler(self) -> type[_FlakyHandler]:
        content = np.random.default_rng(0).bytes(1_000_003)
        return type("Handler", (_FlakyHandler,), {"content": content, "seen": []})

    @pytest.fixture
    def site(self, handler: type[_FlakyHandler]) -> Iterator[str]:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()
            thread.join()

    def test_truncated_body_is_continued(self, site: str, handler: type[_FlakyHandler], tmp_path: Path) -> None:
        handler.cuts = 2
        download([f"{site}/file.bin"], tmp_path / "deep" / "file.bin", pause=0, progress=False)
        assert (tmp_path / "deep" / "file.bin").read_bytes() == handler.content
        assert handler.seen == [None, "bytes=500001-", "bytes=750002-"]
        assert not (tmp_path / "deep" / "file.bin.part").exists()

    def test_a_later_call_resumes(self, site: str, handler: type[_FlakyHandler], tmp_path: Path) -> None:
        handler.cuts = 1
        with pytest.raises(DataError, match="500001 of 1000003 bytes after 1 attempts"):
            download([f"{site}/file.bin"], tmp_path / "file.bin", attempts=1, progress=False)
        assert not (tmp_path / "file.bin").exists()
        download([f"{site}/file.bin"], tmp_path / "file.bin", progress=False)
        assert (tmp_path / "file.bin").read_bytes() == handler.content
        assert handler.seen[-1] == "bytes=500001-"

    def test_server_without_ranges_starts_over(self, site: str, handler: type[_FlakyHandler], tmp_path: Path) -> None:
        handler.ranges = False
        (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
        download([f"{site}/file.bin"], tmp_path / "file.bin", progress=False)
        assert (tmp_path / "file.bin").read_bytes() == handler.content

    def test_overlong_part_starts_over(self, site: str, handler: type[_FlakyHandler], tmp_path: Path) -> None:
        (tmp_path / "file.bin.part").write_bytes(b"x" * 2_000_000)
        download([f"{site}/file.bin"], tmp_path / "file.bin", pause=0, progress=False)
        assert (tmp_path / "file.bin").read_bytes() == handler.content

    def test_404_is_not_tried_again_and_the_next_url_is(
        self, site: str, handler: type[_FlakyHandler], tmp_path: Path
    ) -> None:
        with pytest.raises(DataError, match="HTTP status 404"):
            download([f"{site}/nothing"], tmp_path / "file.bin", progress=False)
        assert len(handler.seen) == 1
        download([f"{site}/nothing", f"{site}/file.bin"], tmp_path / "file.bin", progress=False)
        assert (tmp_path / "file.bin").read_bytes() == handler.content

    def test_refused_connection_names_the_url(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"127\.0\.0\.1:9/x.*after 2 attempts.*--raw=FILE"):
            download(["http://127.0.0.1:9/x"], tmp_path / "file.bin", attempts=2, pause=0, progress=False)

    def test_a_part_that_cannot_be_written_is_told_at_once(
        self, site: str, handler: type[_FlakyHandler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk is no reason to ask the server again."""

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"file\.bin\.part: cannot write \(No space left on device\), .* MB free"):
            download([f"{site}/file.bin"], tmp_path / "file.bin", progress=False)
        assert len(handler.seen) == 1
