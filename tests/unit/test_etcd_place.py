# SPDX-License-Identifier: Apache-2.0
import pytest

from loden.errors import ConfigError
from loden.stores.etcd.place import Endpoint, Place, clean, parse_location, url_of


@pytest.mark.parametrize(
    ("location", "place"),
    [
        ("h:2379", Place((Endpoint("h", 2379),), "/coreos.com/network")),
        ("h/", Place((Endpoint("h", 2379),), "/coreos.com/network")),
        ("h,192.0.2.1:4001/my/net/", Place((Endpoint("h", 2379), Endpoint("192.0.2.1", 4001)), "/my/net")),
        ("[2001:db8::7]:2379//a//b", Place((Endpoint("2001:db8::7", 2379),), "/a/b")),
        ("[::1]", Place((Endpoint("::1", 2379),), "/coreos.com/network")),
    ],
)
def test_location_is_read(location: str, place: Place) -> None:
    assert parse_location(location) == place
    assert parse_location(str(place)) == place


@pytest.mark.parametrize(
    ("endpoints", "prefix", "url"),
    [
        ("http://127.0.0.1:4001,http://127.0.0.1:2379", "/coreos.com/network", "etcd://127.0.0.1:4001,127.0.0.1:2379/coreos.com/network"),
        ("https://a:2379, https://b:2379/", "//x//", "etcds://a:2379,b:2379/x"),
        ("a", "/x", "etcd://a:2379/x"),
        ("http://[::1]:2379", "/x", "etcd://[::1]:2379/x"),
    ],
)  # fmt: skip
def test_flannels_flags_make_a_url(endpoints: str, prefix: str, url: str) -> None:
    assert url_of(endpoints, prefix) == url


@pytest.mark.parametrize(
    ("endpoints", "prefix", "says"),
    [
        ("http://a,https://b", "/x", "mixes http and https"),
        ("", "/x", "names none"),
        ("ftp://a", "/x", "no such scheme"),
        ("http://a:b", "/x", "is no host and port"),
        ("http://u:geheim@a:2379", "/x", "an endpoint with a user in it is no host and port"),
        ("http://a", "x", "'x' is not allowed"),
        ("http://a", "/x?y", "is not allowed"),
    ],
)
def test_flags_that_make_none_are_explained(endpoints: str, prefix: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as caught:
        url_of(endpoints, prefix)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [("/a//b/", "/a/b"), ("//", ""), ("/a/../b/./c", "/b/c"), ("/..", ""), ("a/b/", "a/b")],
)
def test_path_is_cleaned_as_go_does(path: str, cleaned: str) -> None:
    assert clean(path) == cleaned
