//! A client of the local API: one connection a request, HTTP/1.1 without TLS.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::AsyncRead;
use tokio::net::TcpStream;

use super::exit::{CliError, Exit};
use super::sse::{Event, Parser};
use crate::http::{Code, ErrorBody};

/// Time to connect to a listener on this machine, or on one near it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of an answer that is read whole as JSON.
const ANSWER_BYTES_MAX: usize = 64 << 20;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// Where the API is.
#[derive(Clone, Debug)]
pub struct Client {
    /// As the user named it, for messages.
    address: String,
    /// `host:port`, for connecting and for the Host header.
    authority: String,
}

impl Client {
    /// From `http://HOST:PORT` or `HOST:PORT`.
    pub fn new(address: &str) -> Result<Self, CliError> {
        let wrong = |why: &str| CliError::new(Exit::Usage, format!("--api {address}: {why}"));
        let rest = match address.split_once("://") {
            Some(("http", rest)) => rest,
            Some(_) => return Err(wrong("the API speaks plain http; name http://HOST:PORT")),
            None => address,
        };
        let authority = rest.trim_end_matches('/');
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        if authority.contains('/') || !has_port {
            return Err(wrong("name http://HOST:PORT without a path"));
        }
        Ok(Self { address: format!("http://{authority}"), authority: authority.to_owned() })
    }

    /// A request without a body, answered by JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.json(Method::GET, path, None::<&()>).await
    }

    /// A request with a JSON body, answered by JSON.
    pub async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CliError> {
        let body = body.map(serde_json::to_vec).transpose()?;
        let typed = body.is_some().then_some("application/json");
        let response = self.send(method, path, typed, full(body.unwrap_or_default())).await?;
        let answer = read(response, ANSWER_BYTES_MAX).await?;
        serde_json::from_slice(&answer)
            .with_context(|| format!("{} answered {path} with no JSON that this version knows", self.address))
            .map_err(Into::into)
    }

    /// Sends a stream of bytes as the body, answered by JSON.
    pub async fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        source: impl AsyncRead + Send + 'static,
    ) -> Result<T, CliError> {
        use futures::TryStreamExt as _;
        let stream = tokio_util::io::ReaderStream::with_capacity(source, 64 << 10).map_ok(Frame::data);
        let body = StreamBody::new(stream).boxed_unsync();
        let response = self.send(Method::POST, path, Some("application/octet-stream"), body).await?;
        Ok(serde_json::from_slice(&read(response, ANSWER_BYTES_MAX).await?)?)
    }

    /// The bytes behind a path, at most `max`.
    pub async fn bytes(&self, path: &str, max: usize) -> Result<Bytes, CliError> {
        read(self.send(Method::GET, path, None, full(Vec::new())).await?, max).await
    }

    /// The events behind a path, until the API ends them.
    pub(super) async fn events(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<Event, CliError>> + use<>, CliError> {
        let response = self.send(Method::GET, path, None, full(Vec::new())).await?;
        let address = self.address.clone();
        let state = (response.into_body(), Parser::default(), std::collections::VecDeque::new());
        Ok(futures::stream::try_unfold(state, move |(mut body, mut parser, mut ready)| {
            let address = address.clone();
            async move {
                loop {
                    if let Some(event) = ready.pop_front() {
                        return Ok(Some((event, (body, parser, ready))));
                    }
                    let Some(frame) = body.frame().await else { return Ok(None) };
                    let frame = frame.map_err(|e| gone(&address, &e))?;
                    if let Some(bytes) = frame.data_ref() {
                        ready.extend(parser.push(bytes)?);
                    }
                }
            }
        }))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: Option<&str>,
        body: Body,
    ) -> Result<Response<Incoming>, CliError> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.authority))
            .await
            .map_err(|_| cannot_reach(&self.address, &"no answer in 5 s"))?
            .map_err(|e| cannot_reach(&self.address, &e))?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| cannot_reach(&self.address, &e))?;
        // It ends with the response that it carries; the command ends soon after.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the API");
            }
        });
        let mut request =
            Request::builder().method(method).uri(path).header(HOST, &self.authority).header(ACCEPT, "*/*");
        if let Some(content_type) = content_type {
            request = request.header(CONTENT_TYPE, content_type);
        }
        let response = sender.send_request(request.body(body)?).await.map_err(|e| gone(&self.address, &e))?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response).await) }
    }
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed_unsync()
}

async fn read(response: Response<Incoming>, max: usize) -> Result<Bytes, CliError> {
    let mut body = response.into_body();
    if body.size_hint().lower() > max as u64 {
        return Err(CliError::new(Exit::Failure, format!("the answer has more than {max} bytes")));
    }
    let mut bytes = bytes::BytesMut::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame.context("the answer broke off")?.into_data() {
            if bytes.len() + data.len() > max {
                return Err(CliError::new(Exit::Failure, format!("the answer has more than {max} bytes")));
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes.freeze())
}

async fn refusal(response: Response<Incoming>) -> CliError {
    let status = response.status();
    let body = read(response, 1 << 20).await.unwrap_or_default();
    let Ok(ErrorBody { error }) = serde_json::from_slice::<ErrorBody>(&body) else {
        return CliError::new(Exit::Failure, format!("{status}, and not an answer of this API; is --api right?"));
    };
    let exit = match error.code {
        Code::Internal | Code::Unavailable | Code::Timeout => Exit::Failure,
        Code::JobFailed => Exit::Job,
        Code::BadRequest | Code::UnsupportedMedia | Code::MethodNotAllowed => Exit::Usage,
        _ => Exit::Refused,
    };
    let hint = error.hint.map(|hint| format!("; {hint}")).unwrap_or_default();
    CliError::new(exit, format!("{}{hint}", error.message))
}

fn cannot_reach(address: &str, why: &dyn std::fmt::Display) -> CliError {
    CliError::new(
        Exit::Unreachable,
        format!(
            "cannot reach the API at {address}: {why}; is a node running here (`sundara-node --role light`), and is --api or SUNDARA_API right?"
        ),
    )
}

fn gone(address: &str, why: &dyn std::fmt::Display) -> CliError {
    CliError::new(Exit::Unreachable, format!("the API at {address} broke off: {why}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_api() {
        for (given, authority) in [
            ("http://127.0.0.1:4102", "127.0.0.1:4102"),
            ("http://localhost:80/", "localhost:80"),
            ("[::1]:4102", "[::1]:4102"),
        ] {
            assert_eq!(Client::new(given).unwrap().authority, authority);
        }
        for bad in ["https://127.0.0.1:4102", "http://host", "http://host:port", "http://host:1/v1", ""] {
            assert_eq!(Client::new(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }
}
