"""Both kinds of buckets, on servers of this machine, behind proxies that can make requests fail."""

import itertools
import json
import urllib.request

import pytest
import servers

_names = (f"bucket-{number}" for number in itertools.count())


@pytest.fixture(scope="session")
def proxies():
    """{"gs": Proxy, "s3": Proxy}; whoever asks for buckets in this session is sent to them."""
    with servers.s3_server() as s3_port, servers.gcs_server() as gs_port, pytest.MonkeyPatch.context() as environment:
        proxies = {"s3": servers.Proxy(s3_port), "gs": servers.Proxy(gs_port)}
        for name, value in {
            "AWS_ENDPOINT_URL": proxies["s3"].url,
            "AWS_ACCESS_KEY_ID": "anyone",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "STORAGE_EMULATOR_HOST": proxies["gs"].url,  # gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": proxies["gs"].url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",  # TensorStore
            "NO_GCE_CHECK": "true",  # gcsfs looks for no metadata server
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which the server has not
        }.items():
            environment.setenv(name, value)
        yield proxies
        for proxy in proxies.values():
            proxy.close()


@pytest.fixture(params=["gs", "s3"])
def proxy(request, proxies):
    """The proxy before the kind of buckets that the test is about; no request fails when the test begins and ends."""
    proxy = proxies[request.param]
    yield proxy
    proxy.fault = None


@pytest.fixture
def bucket(proxy, proxies):
    """A new bucket, as gs://NAME or s3://NAME."""
    name = next(_names)
    if proxy is proxies["gs"]:
        body, headers = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/storage/v1/b", body, headers)).close()
        return f"gs://{name}"
    urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/{name}", method="PUT")).close()
    return f"s3://{name}"
