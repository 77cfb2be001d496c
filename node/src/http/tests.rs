//! The API over a real light node that knows nobody.

use std::collections::BTreeSet;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::*;
use crate::api::Node;

struct Api {
    router: Router,
    node: Node,
    spool: tempfile::TempDir,
}

impl Api {
    async fn new() -> Self {
        let node = Node::builder().loopback().start().await.unwrap();
        let spool = tempfile::tempdir().unwrap();
        let router =
            routes::router(node.clone(), &HttpConfig::default(), spool.path().to_path_buf(), CancellationToken::new());
        Self { router, node, spool }
    }

    async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn call(&self, method: &str, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        let mut request = request(method, path);
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let response = self.send(request.body(body).unwrap()).await;
        let status = response.status();
        (status, serde_json::from_slice(&bytes(response).await).unwrap_or(Value::Null))
    }
}

fn request(method: &str, path: &str) -> axum::http::request::Builder {
    let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
    Request::builder().method(method).uri(path).header(header::HOST, "127.0.0.1:4102")
}

async fn bytes(response: Response) -> bytes::Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

fn code(body: &Value) -> &str {
    body["error"]["code"].as_str().unwrap_or("no error body")
}

#[test]
fn the_description_lists_the_routes_that_there_are() {
    let document: Value = serde_json::from_str(routes::OPENAPI).unwrap();
    let mut described = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            described.insert((method.clone(), path.clone()));
        }
    }
    let served: BTreeSet<_> =
        routes::ROUTES.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
    assert_eq!(described, served);
    // Every reference leads somewhere.
    let text = document.to_string();
    for part in text.split("\"$ref\":\"#/").skip(1) {
        let pointer = format!("/{}", part.split('"').next().unwrap());
        assert!(document.pointer(&pointer).is_some(), "{pointer}");
    }
}

#[test]
fn the_description_knows_every_field_and_code() {
    let document: Value = serde_json::from_str(routes::OPENAPI).unwrap();
    let full = JobRequest {
        model: Some(String::new()),
        builtin: Some(String::new()),
        entry: Some(String::new()),
        input: Some(InlineBytes::of(b"")),
        params: Some(InlineBytes::of(b"")),
        params_base64: Some(String::new()),
        seed: Some(0),
        replicas: Some(1),
        hardware_class: Some(String::new()),
        stream: Some(true),
        not_after_s: Some(1),
        announce: Some(true),
        limits: Some(sundara_proto::job::Limits::default()),
    };
    let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let described = fields(&document["components"]["schemas"]["JobRequest"]["properties"]);
    assert_eq!(described, fields(&serde_json::to_value(full).unwrap()));
    let codes = &document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]["code"]["enum"];
    for code in codes.as_array().unwrap() {
        serde_json::from_value::<Code>(code.clone()).unwrap();
    }
    assert_eq!(codes.as_array().unwrap().len(), 14);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_described_route_is_served_and_no_other() {
    let api = Api::new().await;
    let id = "00".repeat(32);
    for (method, path) in routes::ROUTES {
        let path = path.replace("{id}", &id);
        let (status, body) = api.call(method, &path, None).await;
        let absent = status == StatusCode::NOT_FOUND && body["error"]["message"] == "there is no such path";
        assert!(!absent && status != StatusCode::METHOD_NOT_ALLOWED, "{method} {path}: {status} {body}");
    }
    for (method, path, expected) in [
        ("get", "/v2/jobs", "not_found"),
        ("put", "/v1/jobs", "method_not_allowed"),
        ("get", "/v1/models/fetch", "method_not_allowed"),
    ] {
        assert_eq!(code(&api.call(method, path, None).await.1), expected, "{method} {path}");
    }
    api.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_other_sites_reach_no_route() {
    let api = Api::new().await;
    let refused = |host: &'static str, origin: Option<&'static str>| {
        let api = &api;
        async move {
            let mut request = Request::builder().uri("/v1/status").header(header::HOST, host);
            if let Some(origin) = origin {
                request = request.header(header::ORIGIN, origin);
            }
            api.send(request.body(Body::empty()).unwrap()).await.status() == StatusCode::FORBIDDEN
        }
    };
    assert!(!refused("localhost:4102", None).await);
    assert!(refused("rebound.example:4102", None).await);
    assert!(refused("127.0.0.1:4102", Some("http://evil.example")).await);
    assert!(!refused("127.0.0.1:4102", Some("http://127.0.0.1:4102")).await);
    let without = Request::builder().uri("/v1/status").body(Body::empty()).unwrap();
    assert_eq!(api.send(without).await.status(), StatusCode::BAD_REQUEST);

    // What a form of another site can send unasked: no body of these types is taken.
    for kind in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        let simple =
            request("post", "/v1/jobs").header(header::CONTENT_TYPE, kind).body(Body::from(r#"{"builtin":"echo"}"#));
        assert_eq!(api.send(simple.unwrap()).await.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE, "{kind}");
    }
    api.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_do_not_fit_are_refused_in_words() {
    let api = Api::new().await;
    for (body, expected) in [
        (json!({}), "bad_request"),
        (json!({"builtin": "echo", "model": "a/b"}), "bad_request"),
        (json!({"builtin": "echo", "replica": 2}), "bad_request"),
        (json!({"builtin": "echo", "replicas": 300}), "bad_request"),
        (json!({"builtin": "echo", "input": {"base64": "&&"}}), "bad_request"),
        (json!({"builtin": "echo", "input": {"utf8": "x", "base64": "eA=="}}), "bad_request"),
        (json!([1, 2]), "bad_request"),
        (json!({"builtin": "echo", "input": {"utf8": "x".repeat(2 << 20)}}), "too_large"),
        (json!({"builtin": "echo"}), "refused"),
    ] {
        let (status, answer) = api.call("post", "/v1/jobs", Some(body)).await;
        assert_eq!(code(&answer), expected, "{status} {answer}");
        assert!(!answer["error"]["message"].as_str().unwrap().is_empty());
    }
    let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[b' '; 1 << 16])));
    let chunked = request("post", "/v1/jobs").header(header::CONTENT_TYPE, "application/json");
    let response = api.send(chunked.body(Body::from_stream(endless)).unwrap()).await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE, "a body of no announced length is bounded too");
    for garbage in [&b"{"[..], b"\xff\xfe", b"", b"null"] {
        let request = request("post", "/v1/jobs").header(header::CONTENT_TYPE, "application/json; charset=utf-8");
        let response = api.send(request.body(Body::from(garbage)).unwrap()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{garbage:?}");
    }
    for path in ["/v1/jobs/xyz", "/v1/jobs?limit=x", "/v1/jobs?lim=1"] {
        assert_eq!(code(&api.call("get", path, None).await.1), "bad_request", "{path}");
    }
    let (status, answer) = api.call("get", &format!("/v1/jobs/{}", "00".repeat(32)), None).await;
    assert_eq!((status, code(&answer)), (StatusCode::NOT_FOUND, "not_found"));
    api.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_are_bounded_and_leave_nothing_behind() {
    let api = Api::new().await;
    let upload = |query: &'static str, body: Body| {
        let request =
            request("post", &format!("/v1/jobs{query}")).header(header::CONTENT_TYPE, "application/octet-stream");
        api.send(request.body(body).unwrap())
    };
    assert_eq!(upload("", Body::empty()).await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(upload("?builtin=echo&x=1", Body::empty()).await.status(), StatusCode::BAD_REQUEST);
    // A node without trusted validators submits nothing, but it takes the input first.
    for len in [0, 1, 200 << 10, 3 << 20] {
        let answer =
            upload("?builtin=echo&replicas=2&stream=true&seed=7&params_base64=eA%3D%3D", Body::from(vec![7; len]))
                .await;
        assert_eq!(answer.status(), StatusCode::UNPROCESSABLE_ENTITY, "{len}");
    }
    let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[0; 1 << 20])));
    assert_eq!(upload("?builtin=echo", Body::from_stream(endless)).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let broken = futures::stream::iter([Ok(bytes::Bytes::from_static(b"x")), Err(std::io::Error::other("gone"))]);
    assert_eq!(upload("?builtin=echo", Body::from_stream(broken)).await.status(), StatusCode::BAD_REQUEST);
    assert_eq!(std::fs::read_dir(api.spool.path()).unwrap().count(), 0, "no input stays in the spool");
    api.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_tells_how_it_is() {
    let api = Api::new().await;
    assert_eq!(api.call("get", "/health", None).await, (StatusCode::OK, json!({"status": "ok"})));
    let (status, ready) = api.call("get", "/ready", None).await;
    assert_eq!((status, &ready["ready"]), (StatusCode::SERVICE_UNAVAILABLE, &json!(false)));
    assert!(!ready["missing"].as_array().unwrap().is_empty(), "it says what is missing");
    let (_, status) = api.call("get", "/v1/status", None).await;
    assert_eq!(status["hotkey"], api.node.hotkey().to_string());
    assert_eq!(api.call("get", "/v1/peers", None).await.1, json!({"items": []}));
    assert_eq!(api.call("get", "/v1/jobs", None).await.1, json!({"items": []}));
    let (code_, body) = api.call("get", "/v1/miner/jobs", None).await;
    assert_eq!((code_, code(&body)), (StatusCode::NOT_FOUND, "not_served"));

    let metrics = api.send(request("get", "/metrics").body(Body::empty()).unwrap()).await;
    assert!(metrics.headers()[header::CONTENT_TYPE].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = String::from_utf8(bytes(metrics).await.to_vec()).unwrap();
    assert!(text.ends_with("# EOF\n") && text.contains("sundara_net_connections "), "{text}");
    api.node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_loopback_is_bound_unasked() {
    let node = Node::builder().loopback().start().await.unwrap();
    let spool = tempfile::tempdir().unwrap();
    let config = HttpConfig { listen: ([0, 0, 0, 0], 0).into(), ..HttpConfig::default() };
    let refused = serve(node.clone(), &config, spool.path().to_path_buf()).await.err().unwrap();
    assert!(refused.to_string().contains("http.allow_remote"), "{refused}");

    let config = HttpConfig { listen: ([127, 0, 0, 1], 0).into(), ..HttpConfig::default() };
    let server = serve(node.clone(), &config, spool.path().to_path_buf()).await.unwrap();
    let taken = HttpConfig { listen: server.address(), ..HttpConfig::default() };
    let error = serve(node.clone(), &taken, spool.path().to_path_buf()).await.err().unwrap();
    assert!(matches!(error, HttpError::Bind { .. }), "{error}");
    server.shutdown().await;
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_limit_wait_and_endless_heads_are_cut() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    let node = Node::builder().loopback().start().await.unwrap();
    let spool = tempfile::tempdir().unwrap();
    let config = HttpConfig { listen: ([127, 0, 0, 1], 0).into(), connections_max: 1, ..HttpConfig::default() };
    let server = serve(node.clone(), &config, spool.path().to_path_buf()).await.unwrap();

    let head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    let mut first = TcpStream::connect(server.address()).await.unwrap();
    first.write_all(b"GET /health HTTP/1.1\r\nx: ").await.unwrap();
    let mut second = TcpStream::connect(server.address()).await.unwrap();
    second.write_all(head).await.unwrap();
    // The first has the only slot until its head turns out to be too long.
    let filler = vec![b'a'; 64 << 10];
    let _ = first.write_all(&filler).await;
    let mut answer = Vec::new();
    second.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    server.shutdown().await;
    node.shutdown().await;
}
