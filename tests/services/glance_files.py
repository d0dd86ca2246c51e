"""The files that a Glance without Keystone is configured by."""

from __future__ import annotations

CONF = """\
[DEFAULT]
log_file = {dir}/log/glance.log
enabled_backends = s0:{store}
show_image_direct_url = true
show_multiple_locations = true
enabled_import_methods = [glance-direct,copy-image]
worker_self_reference_url = {url}
image_cache_dir = {dir}/tmp
node_staging_uri = file://{dir}/staging
hashing_algorithm = sha512
[database]
connection = sqlite:///{dir}/glance.sqlite
[glance_store]
default_backend = s0
[s0]
{store_options}
[os_glance_staging_store]
filesystem_store_datadir = {dir}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {dir}/tasks
[oslo_concurrency]
lock_path = {dir}/tmp
[oslo_messaging_notifications]
driver = noop
[oslo_policy]
policy_file = {dir}/etc/policy.yaml
enforce_scope = false
[paste_deploy]
config_file = {dir}/etc/glance-api-paste.ini
"""

PASTE = """\
[composite:glance-api]
paste.composite_factory = glance.api:root_app_factory
/: api
[composite:api]
paste.composite_factory = glance.api:pipeline_factory
default = versionnegotiation anyone context rootapp
[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app
[app:apiversions]
paste.app_factory = glance.api.versions:create_resource
[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory
[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory
[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
[filter:anyone]
paste.filter_factory = imagecache_anyone:factory
log = {dir}/log/requests
"""

# Glance's own noauth pipeline makes an admin without a project, whom the default policy forbids to create images.
# A request is logged before its answer leaves, so that a client that has the answer finds the request counted.
ANYONE = '''\
"""Believes any token, logs each request, and lets sqlite's transactions wait for each other.

A transaction that has read cannot wait for its turn to write: sqlite refuses it at once ("database is locked"). Where
Glance takes up an import it does not try again: the task stays "pending", and the image locked, for two hours.
"""
import json
import os
import uuid

from sqlalchemy import event
from sqlalchemy.engine import Engine


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def wait_for_the_others(conn, cursor, statement, parameters, context, executemany):
    return ("BEGIN IMMEDIATE" if statement == "BEGIN" else statement), parameters


def factory(global_conf, log):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def make(app):
        def handle(environ, start_response):
            parts = environ.get("HTTP_X_AUTH_TOKEN", "").split(":")
            if len(parts) != 3:
                parts = ["admin", "testproject", "admin,member,reader,service"]
            user, project, roles = parts
            environ["HTTP_X_IDENTITY_STATUS"] = "Confirmed"
            environ["HTTP_X_USER_ID"] = uuid.uuid5(uuid.NAMESPACE_DNS, user).hex
            environ["HTTP_X_PROJECT_ID"] = environ["HTTP_X_TENANT_ID"] = uuid.uuid5(uuid.NAMESPACE_DNS, project).hex
            environ["HTTP_X_ROLES"] = roles
            if "service" in roles.split(","):
                environ["HTTP_X_SERVICE_ROLES"] = "service"
            seen = {
                "method": environ["REQUEST_METHOD"],
                "path": environ["PATH_INFO"],
                "range": environ.get("HTTP_RANGE"),
                "user": user,
            }

            def start(status, headers, *rest):
                line = json.dumps({**seen, "status": int(status.split()[0])}) + "\\n"
                os.write(file, line.encode())
                return start_response(status, headers, *rest)

            return app(environ, start)

        return handle

    return make
'''
