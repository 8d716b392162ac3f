"""Whether the daemon of this container answers: /livez, over loopback, by whatever settings it has."""

import os
import ssl
import sys
import urllib.request

host = os.environ.get("ENVD_HOST", "").strip()
if host in ("", "0.0.0.0", "::"):
    host = "127.0.0.1" if host != "::" else "::1"
host = f"[{host}]" if ":" in host else host
scheme = "https" if os.environ.get("ENVD_TLS_CERT") else "http"
url = f"{scheme}://{host}:{os.environ.get('ENVD_PORT') or 15001}/livez"
# Whose certificate that is does not matter here.
handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
try:
    urllib.request.build_opener(*handlers).open(url, timeout=4)
except OSError as error:
    sys.exit(f"{url}: {error}")
