//! Who may ask: every request passes here before its route.
//!
//! The API has no passwords, so what protects it is where it listens, and that no web page can use a browser on this
//! machine to reach it. Three checks do that. `Host` must be an IP address, `localhost` or a configured name: a page of
//! another site that points its own name here (DNS rebinding) is refused. `Origin`, where there is one, must be this
//! API's own. And what changes something has a body of a type that a page cannot send unasked (see the routes), or a
//! method that it cannot.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::{ApiError, Code};

/// Names under which the API may be addressed.
#[derive(Clone, Debug, Default)]
pub(super) struct Hosts(Arc<[String]>);

impl Hosts {
    pub(super) fn new(names: &[String]) -> Self {
        Self(names.iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    fn allows(&self, host: &str) -> bool {
        let name = host_name(host).to_ascii_lowercase();
        name.parse::<IpAddr>().is_ok() || name == "localhost" || self.0.contains(&name)
    }
}

/// Address of the peer of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Refuses what another site's page may have sent.
pub(super) async fn check(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    match refuse(&hosts, request.uri().host(), request.headers()) {
        Some(error) => error.into_response(),
        None => error_bodies(next.run(request).await),
    }
}

fn refuse(hosts: &Hosts, uri_host: Option<&str>, headers: &HeaderMap) -> Option<ApiError> {
    let text = |name: header::HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
    let Some(host) = text(header::HOST).or(uri_host) else {
        return Some(ApiError::new(Code::BadRequest, "the request has no Host header"));
    };
    if headers.get_all(header::HOST).iter().count() > 1 || !hosts.allows(host) {
        let error = ApiError::new(Code::Forbidden, format!("the API is not served under the name `{}`", clip(host)));
        return Some(error.hint("address it by IP or as localhost, or add the name to http.hosts"));
    }
    if let Some(origin) = text(header::ORIGIN) {
        let own = origin.strip_prefix("http://").or(origin.strip_prefix("https://"));
        if !own.is_some_and(|own| own.eq_ignore_ascii_case(host)) {
            let error =
                ApiError::new(Code::Forbidden, format!("requests of pages from `{}` are refused", clip(origin)));
            return Some(error.hint("call the API from a program, or from a page that this API serves"));
        }
    }
    None
}

/// Gives axum's own refusals (no such path, wrong method, body too large) the body that every error has.
fn error_bodies(response: Response) -> Response {
    let ours =
        response.headers().get(header::CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"application/json"));
    if ours {
        return response;
    }
    let error = match response.status() {
        StatusCode::NOT_FOUND => ApiError::new(Code::NotFound, "there is no such path"),
        StatusCode::METHOD_NOT_ALLOWED => ApiError::new(Code::MethodNotAllowed, "the path does not take this method"),
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(Code::TooLarge, "the body is larger than the route takes"),
        _ => return response,
    };
    let allow = response.headers().get(header::ALLOW).cloned();
    let mut answer = error.hint("GET /v1/openapi.json lists paths, methods and limits").into_response();
    if let Some(allow) = allow {
        answer.headers_mut().insert(header::ALLOW, allow);
    }
    answer
}

/// A host without its port; brackets of IPv6 removed.
fn host_name(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    match host.rsplit_once(':') {
        Some((name, _)) if !name.contains(':') => name,
        _ => host,
    }
}

fn clip(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn refused(host: &str, origin: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        refuse(&Hosts::new(&["Node.Example".to_owned()]), None, &headers).is_some()
    }

    #[test]
    fn names_of_other_sites_are_refused() {
        for good in [
            "127.0.0.1:4102",
            "127.0.0.1",
            "[::1]:4102",
            "[::1]",
            "localhost:4102",
            "LOCALHOST",
            "10.0.0.7:1",
            "node.example:4102",
        ] {
            assert!(!refused(good, None), "{good}");
        }
        for bad in [
            "evil.example",
            "evil.example:4102",
            "localhost.evil.example",
            "127.0.0.1.evil.example:4102",
            "",
            "[",
            "a:b:c",
            "127.0.0.1@evil",
        ] {
            assert!(refused(bad, None), "{bad}");
        }
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        assert!(!refused("127.0.0.1:4102", Some("http://127.0.0.1:4102")));
        for bad in ["http://evil.example", "null", "http://127.0.0.1:4103", "http://localhost:4102", "file://", ""] {
            assert!(refused("127.0.0.1:4102", Some(bad)), "{bad}");
        }
    }
}
